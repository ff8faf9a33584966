"""The rows of the page's benchmark: what somebody at the page waits for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """Clicks on a photograph whose embedding is resident, one after the other, in a headless Chromium.

    Args:
        step: `first click` begins an object, `refining click` sends the token of its mask along.
        ms_p50, ms_p99: from the mouse's event until the frame with the mask was drawn.
        gateway_ms_p50: of these, from the request's arrival at the gateway to its answer.
        paint_ms_p50: of these, from the answer's last byte until the frame was drawn.
    """

    step: str
    clicks: int
    ms_p50: float
    ms_p99: float
    gateway_ms_p50: float
    paint_ms_p50: float
    browser: str
    gpu: str
    torch: str
    triton: str
    commit: str
    command: str

    @property
    def key(self) -> tuple[str, ...]:
        """What one run measures, and a later one replaces."""
        return self.gpu, self.step
