"""The rows of the waterfall: one rung of one model at one batch, and the CSV that keeps them."""

from dataclasses import dataclass

from bench.row_file import columns_of

BASELINE = "segment-anything"
Key = tuple[str, str, str, int, int, str]


@dataclass(frozen=True)
class Row:
    """One measured rung. None is a figure that does not exist there, an empty field in the CSV.

    Args:
        scope: `encoder` is pixels to embeddings, `end_to_end` goes on to the logits of every prompt.
        weights: `random`, `trained`, or either with `+outliers`.
        batch: images in one forward pass.
        ms_p50: of a batch, as is `ms_p99`.
        x_prev: throughput against the row before it at this batch and in the same run.
        x_fp32: throughput against unmodified segment-anything at batch 1, timed in the same run.
        peak_mib: most device memory in use while it ran, weights included; None on a CPU.
        compile_s: building it and its first answer at this batch, compilation and capture included.
        embedding_error: relative to fp32, root mean square over root mean square; the worst image of the batch.
        mask_miou: mean IoU of its masks with those of fp32, same prompt and same mask token; None without training.
        index_flips: prompts for which it rates another mask token best than fp32 does.
    """

    scope: str
    model: str
    weights: str
    batch: int
    rung: str
    ms_p50: float
    ms_p99: float
    img_s: float
    x_prev: float | None
    x_fp32: float
    peak_mib: float | None
    compile_s: float
    embedding_error: float
    mask_miou: float | None
    index_flips: int | None
    gpu: str
    torch: str
    triton: str
    commit: str
    command: str

    @property
    def key(self) -> Key:
        """What one run measures together and replaces together."""
        return self.scope, self.model, self.weights, self.pruning_images, self.batch, self.gpu

    @property
    def pruning_images(self) -> int:
        """How many images 2:4 was pruned on; 0 where it was by magnitude."""
        return sum(word.partition("=")[0] == "--image" for word in self.command.split())


COLUMNS = columns_of(Row)
