"""Checks something against float32, then times it."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import triton

from bench.attention.inputs import DTYPE, KINDS, MODELS, TOKENS, Inputs, make_inputs
from bench.attention.rows import Row
from splitsam.kernels.relpos_window import WINDOW

REPEAT_MS = 10  # of ten replays each


@dataclass(frozen=True)
class Variant:
    """Something to time. `image` cuts an image out of its output, `expected` is the float32 result of that image."""

    name: str
    run: Callable[[], torch.Tensor]
    image: Callable[[torch.Tensor, int], torch.Tensor]
    expected: Callable[[int], torch.Tensor]
    note: str = ""


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (actual.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    return float(difference)


def allowed_error(inputs: Inputs) -> float:
    return 2 * relative_error(inputs.reference(0, DTYPE), inputs.reference(0, torch.float32))


@dataclass(frozen=True)
class Case:
    """A model, kind and batch, with its inputs on the GPU."""

    model: str
    batch: int
    inputs: Inputs
    allowed_error: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "allowed_error", allowed_error(self.inputs))

    @property
    def tflop(self) -> float:
        heads, d = MODELS[self.model]
        keys = TOKENS if self.inputs.kind == "global" else WINDOW * WINDOW
        return 4e-12 * self.batch * TOKENS * keys * heads * d

    @functools.cached_property
    def expected(self) -> dict[int, torch.Tensor]:
        return {image: self.inputs.reference(image, torch.float32) for image in {0, self.batch - 1}}


def measure(case: Case, variant: Variant) -> Row:
    """Checks a variant, then times it; a failure becomes the row's note."""
    row = functools.partial(Row, case.model, case.inputs.kind, case.batch, variant.name)
    try:
        out = variant.run()
        images = {0, case.batch - 1}
        errors = [relative_error(variant.image(out, image), variant.expected(image)) for image in images]
        error = max(errors, key=lambda e: math.inf if math.isnan(e) else e)
        del out
        if not error <= case.allowed_error:
            return row(error=error, allowed_error=case.allowed_error, note=f"WRONG, not timed {variant.note}")
        ms = triton.testing.do_bench_cudagraph(variant.run, rep=REPEAT_MS, return_mode="median")
    except Exception as failure:  # noqa: BLE001 one variant's failure must not stop the others
        note = f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:160]
        return row(allowed_error=case.allowed_error, note=note)
    finally:
        torch.cuda.empty_cache()
    return row(ms, case.tflop / ms * 1e3, error, case.allowed_error, variant.note)


def ours(case: Case, name: str, run: Callable[[], torch.Tensor], note: str = "") -> Variant:
    return Variant(name, run, lambda out, image: out[image : image + 1], case.expected.__getitem__, note)


def cases(batches: tuple[int, ...]) -> Iterator[Case]:
    for kind, (model, (heads, d)), batch in itertools.product(KINDS, MODELS.items(), batches):
        yield Case(model, batch, make_inputs(kind, heads, d, batch))
        torch.cuda.empty_cache()
