"""What an operation asks of its client: the only points where the synchronous and the asyncio client differ.

An operation is a generator. It yields a step, the client performs it and sends back the outcome or throws its
`SplitsamError` or `OSError` into the generator; what the generator returns is the result. So hashing first, waiting
as told, encoding again and replaying are written once, in `operations` and `bulk`, for both clients.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from google.protobuf.message import Message

from splitsam.client.errors import SplitsamError
from splitsam.client.names import Address
from splitsam.client.results import BulkResult, FoundMask, ImageSource
from splitsam.v1 import encoder_pb2

T = TypeVar("T")
Service = Literal["encoder", "decoder"]
# Of a call that any replica may answer: which one is asked is chosen when it is sent, by `replicas`.
ANY = Address("")


@dataclass(frozen=True)
class Resolve:
    """Look up what these stand for; the outcome are addresses. May wait, so long at most; see `Names`."""

    given: tuple[str, ...]
    timeout_s: float


@dataclass(frozen=True)
class Unary:
    """Call once; the outcome is the response."""

    service: Service
    address: Address
    method: str
    request: Message
    timeout_s: float


@dataclass(frozen=True)
class Collect:
    """Call once; the outcome is the list of all messages of the answering stream."""

    service: Service
    address: Address
    method: str
    request: Message
    timeout_s: float


@dataclass(frozen=True)
class Follow:
    """Call once, in place of any open stream; its messages are read with `ReceiveBulk`."""

    service: Service
    address: Address
    method: str
    request: Message
    timeout_s: float


@dataclass(frozen=True)
class Tell:
    """Call once without waiting for the outcome, which nobody needs."""

    service: Service
    address: Address
    method: str
    request: Message
    timeout_s: float


@dataclass(frozen=True)
class Wait:
    """Let time pass."""

    delay_s: float


@dataclass(frozen=True)
class Leave:
    """Make later calls on new connections, which may lead to other servers; one that was opened just now is kept."""


@dataclass(frozen=True)
class Load:
    """Read an image file; the outcome is its bytes and their SHA-256."""

    source: ImageSource


@dataclass(frozen=True)
class OpenBulk:
    """Open an EncodeImages stream in place of any open one."""

    address: Address
    timeout_s: float


@dataclass(frozen=True)
class SendBulk:
    """Write to the open stream."""

    request: encoder_pb2.EncodeImagesRequest


@dataclass(frozen=True)
class ReceiveBulk:
    """Read from the open stream; the outcome is a response, or None at its end. Silence for that long is a failure."""

    idle_timeout_s: float


@dataclass(frozen=True)
class CloseBulk:
    """Say that nothing more will be sent and wait for the server to end the stream."""

    idle_timeout_s: float


@dataclass(frozen=True)
class Emit:
    """Hand a result to the caller."""

    result: BulkResult | FoundMask


Step = (
    Resolve
    | Unary
    | Collect
    | Follow
    | Tell
    | Wait
    | Leave
    | Load
    | OpenBulk
    | SendBulk
    | ReceiveBulk
    | CloseBulk
    | Emit
)
Operation = Generator[Step, Any, T]


def resume(operation: Operation[Any], outcome: Any) -> Step:
    """Give an operation the outcome of its step, or the error it failed with, and get its next step."""
    if isinstance(outcome, SplitsamError | OSError):
        return operation.throw(outcome)
    return operation.send(outcome)
