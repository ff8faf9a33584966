"""What simulated callers share: images that no service has seen, connections, what an answer says of itself."""

from typing import Any

import grpc.aio

from splitsam.client.connection import channel_options
from splitsam.client.names import Address


def make_different(image: bytes, caller: int, number: int) -> bytes:
    """An image file with numbers behind its end: another image to the service, of the same size and cost.

    Args:
        caller: of those who send at one time.
        number: of the image among the caller's.
    """
    return image + caller.to_bytes(4, "big") + number.to_bytes(8, "big")


def open_channel(address: str) -> grpc.aio.Channel:
    """A connection that is shared with no other channel of this process."""
    return grpc.aio.insecure_channel(
        address, options=[*channel_options(Address(address)), ("grpc.use_local_subchannel_pool", 1)]
    )


def read_stages(timings: Any) -> dict[str, float]:
    """Milliseconds by stage, of the message of timings in an answer."""
    return {field.name.removesuffix("_ms"): getattr(timings, field.name) for field in timings.DESCRIPTOR.fields}
