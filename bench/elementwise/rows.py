"""The rows of the elementwise benchmark: one kernel or product of a block."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table and of the CSV; None is a figure that does not exist there.

    Args:
        rows: of activations, 4096 an image.
        shape: channels, and of a product its outputs.
    """

    model: str
    rows: int
    operation: str
    shape: str
    ms: float
    gb_s: float
    tflop_s: float | None
    error: float
    gpu: str
    torch: str
    triton: str
    commit: str
    command: str

    @property
    def key(self) -> tuple[str, int, str]:
        """What one run measures together and replaces together."""
        return self.model, self.rows, self.gpu

    @property
    def cells(self) -> tuple[str, ...]:
        """Of a table, in the order of COLUMNS."""
        tflop_s = "" if self.tflop_s is None else f"{self.tflop_s:.0f}"
        figures = (f"{self.ms:.4f}", f"{self.gb_s:.0f}", tflop_s, f"{self.error:.1e}")
        return self.model, str(self.rows), self.operation, self.shape, *figures


COLUMNS = ("model", "rows", "operation", "shape", "ms", "GB/s", "TFLOP/s", "error")
