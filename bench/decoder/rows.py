"""The rows of `bench.decoder`: one way of answering one scenario."""

from dataclasses import dataclass

ORIGINAL = "segment-anything"


@dataclass(frozen=True)
class Row:
    """One measured way. None is a figure that does not exist there, an empty field in the CSV.

    Args:
        scenario: what was asked; see bench/README.md.
        decoder: `segment-anything`, or ours with its precision.
        prompts: of one call, over all its images; in `everything` the points of the grid.
        ms_p50: of a call by the host's clock, as is `ms_p99`.
        prompts_s: from the median.
        x_original: throughput against unmodified segment-anything in the same run.
        peak_mib: most device memory in use during a call, weights and embeddings included; None on a CPU.
        mask_miou: of its masks with those of segment-anything in fp32; the same mask token, or in `everything` the
            best match of each.
        index_flips: prompts for which it rates another mask token best; None in `everything`.
        masks: found in `everything`, answered elsewhere.
    """

    scenario: str
    decoder: str
    images: int
    prompts: int
    ms_p50: float
    ms_p99: float
    prompts_s: float
    x_original: float
    peak_mib: float | None
    mask_miou: float
    index_flips: int | None
    masks: int
    gpu: str
    torch: str
    triton: str
    commit: str
    command: str

    @property
    def key(self) -> tuple[str, int, str]:
        """What one run measures together and replaces together."""
        return self.scenario, self.images, self.gpu


def describe_row(row: Row) -> str:
    """One line for people."""
    peak = "-" if row.peak_mib is None else f"{row.peak_mib:.0f}"
    flips = "-" if row.index_flips is None else str(row.index_flips)
    return (
        f"{row.scenario:12} {row.decoder:18} {row.images:3} images {row.prompts:5} prompts "
        f"{row.ms_p50:9.3f} / {row.ms_p99:9.3f} ms {row.prompts_s:10.1f} prompts/s  x{row.x_original:7.2f} of the "
        f"original  {peak:>6} MiB  masks {row.mask_miou:.4f}, {flips} flips, {row.masks} masks"
    )
