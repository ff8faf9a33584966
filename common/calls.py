"""Who is calling: the identity and request id that the interceptor sets for the code below it."""

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """One RPC as the code behind the servicer sees it.

    Args:
        tenant: the authenticated caller's tenant; never taken from a request.
        request_id: written on every log line and sent back as trailing metadata.
        method: full gRPC method name.
    """

    tenant: str
    request_id: str
    method: str


current_call: ContextVar[Call] = ContextVar("splitsam_call")
