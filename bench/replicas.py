"""More processes of a service than a stack has."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from bench.faults.deployment import Replica
from splitsam.client.stack import ServiceName, Stack

More = Mapping[ServiceName, Sequence[Replica]]


@contextlib.contextmanager
def more_replicas(stack: Stack, *, encoders: int = 0, decoders: int = 0) -> Iterator[More]:
    """So many of each beside the stack's own, with the same arguments, on the same device."""
    secret = ("--secret-file", str(stack.folder / "secret"))
    of: dict[ServiceName, tuple[int, tuple[str, ...]]] = {
        "encoder": (encoders, stack.settings.encoder_args),
        "decoder": (decoders, stack.settings.decoder_args),
    }
    with contextlib.ExitStack() as running:
        more: dict[ServiceName, list[Replica]] = {}
        for service, (count, arguments) in of.items():
            more[service] = [
                Replica(service, stack.folder, stack.redis_url, (*secret, *arguments)) for _ in range(count)
            ]
            for replica in more[service]:
                running.callback(replica.terminate)
        for replica in (*more["encoder"], *more["decoder"]):
            replica.until_ready(stack.settings.start_timeout_s)
        yield more
