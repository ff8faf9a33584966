"""The rows of the attention benchmark: one way to compute one layer's attention."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A variant at one batch. None is a figure that does not exist: it failed, or was wrong and not timed.

    Args:
        kind: `global`, or `window`.
        variant: `this kernel` with the installed tile, `candidate` with another, or one of PyTorch's.
        ms: GPU time, the median.
        tflops: TFLOP/s.
        error: relative to float32, as is `allowed_error`, twice that of PyTorch's bfloat16.
        note: the tile of a candidate, or what went wrong.
    """

    model: str
    kind: str
    batch: int
    variant: str
    ms: float | None = None
    tflops: float | None = None
    error: float | None = None
    allowed_error: float | None = None
    note: str = ""
    gpu: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    command: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What one run measures together and replaces together."""
        return (self.gpu,)

    def line(self) -> str:
        """For people."""
        what = f"{self.model} {self.kind:6} x{self.batch:<2} {self.variant:28}"
        if self.ms is None:
            return f"{what} {self.note}"
        return f"{what} {self.ms:9.4f} ms {self.tflops:7.1f} TFLOP/s  error {self.error:.1e}  {self.note}".rstrip()
