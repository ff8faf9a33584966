"""Who is calling, and until when: what the interceptor sets for the code below it."""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Call:
    """One RPC as the code behind the servicer sees it.

    Args:
        tenant: the authenticated caller's tenant; never taken from a request.
        request_id: written on every log line and sent back as trailing metadata.
        method: full gRPC method name.
        deadline_s: when the caller gives up, in seconds of time.monotonic(); None when it never does.
        trace_id: of the trace it belongs to, on every log line; empty without one.
        authorization: the caller's credentials as they came, for calls in its name; never to be logged.
    """

    tenant: str
    request_id: str
    method: str
    deadline_s: float | None = None
    trace_id: str = ""
    authorization: str = field(default="", repr=False)

    @property
    def names(self) -> dict[str, str]:
        """What finds this call's log lines, as they show it."""
        trace = {"trace_id": self.trace_id} if self.trace_id else {}
        return {"request_id": self.request_id, **trace}


current_call: ContextVar[Call] = ContextVar("splitsam_call")

_LEAST_WAIT_S = 0.1


def share_of_deadline_s(limit_s: float) -> float:
    """How long a step of the current call may wait: half of what is left to it.

    Args:
        limit_s: never longer than this; never shorter than a tenth of a second.
    """
    call = current_call.get(None)
    if call is None or call.deadline_s is None:
        return limit_s
    return min(limit_s, max(_LEAST_WAIT_S, (call.deadline_s - time.monotonic()) / 2))
