"""Every rung on the GPU: its embedding, no synchronisation, no graph break, no recompilation, no dense bias, graphs."""

import copy
from collections.abc import Iterator

import pytest
import torch
from mask_agreement import ClickedPhotograph, load_photograph, mean_iou
from random_encoders import random_encoder, random_images, relative_error
from torch import nn

from splitsam.common.sam_modules import ImageEncoderViT
from splitsam.encoder_service.graphs import GraphedEncoder
from splitsam.encoder_service.model import EncoderModel
from splitsam.encoder_service.optimize import RUNGS, build_rungs, unsupported
from splitsam.encoder_service.precision import choose_precision
from splitsam.encoder_service.preprocess import PreparedImage
from splitsam.encoder_service.sparsity import prune_2_4_

GPU = torch.device("cuda", 0)
SIDE_PX = 1024
PREFIXES = [RUNGS[:count] for count in range(2, len(RUNGS) + 1)]
TO_FUSED = RUNGS[: RUNGS.index("fused") + 1]
FLOAT8 = (*TO_FUSED, "fp8")
VARIANTS = [("bf16", "triton", "sparse"), ("bf16", "triton", "sparse_mlp"), (*RUNGS[:-1], "sparse_mlp")]
VARIANTS += [("bf16", "triton", "fp8"), FLOAT8]
EXACT = [("sdpa",), ("triton",), ("compile", "sdpa", "triton")]


@pytest.fixture(scope="module", params=[64, 80])
def encoder(request: pytest.FixtureRequest) -> ImageEncoderViT:
    return random_encoder(request.param, SIDE_PX, heads=4)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Each encoder compiles the same code of a block: leftovers of other tests would count as recompilations."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.cuda.empty_cache()


def built(encoder: nn.Module, rungs: tuple[str, ...]) -> nn.Module:
    for rung in rungs:
        reason = unsupported(rung, GPU)
        if reason is not None:
            pytest.skip(f"{rung}: {reason}")
    return build_rungs(copy.deepcopy(encoder), rungs, GPU)


def images_of(count: int) -> torch.Tensor:
    return random_images(count, SIDE_PX).to(GPU)


def expected_of(encoder: ImageEncoderViT, rungs: tuple[str, ...], images: torch.Tensor) -> torch.Tensor:
    """segment_anything's own in float32, or, where the last rung prunes, those before it on dense pruned weights."""
    if not rungs[-1].startswith("sparse"):
        return copy.deepcopy(encoder).to(GPU)(images)
    # Pruned as rounded and on the same device: of two weights that became the same, either may win.
    reference = built(encoder, tuple(rung for rung in rungs[:-1] if rung != "compile"))
    prune_2_4_(reference, "mlp" if rungs[-1] == "sparse_mlp" else "all")
    return reference(images).float()


@pytest.mark.parametrize("rungs", EXACT, ids="-".join)
def test_exact_rung_gives_the_embedding_of_segment_anything(encoder: ImageEncoderViT, rungs: tuple[str, ...]):
    images = images_of(2)
    assert (built(encoder, rungs)(images) - expected_of(encoder, rungs, images)).abs().max() <= 1e-4


@pytest.mark.parametrize("rungs", [*PREFIXES, *VARIANTS], ids="-".join)
def test_rung_errs_no_more_than_its_rounding(encoder: ImageEncoderViT, rungs: tuple[str, ...]):
    images = images_of(2)
    error = relative_error(built(encoder, rungs)(images), expected_of(encoder, rungs, images))
    # bf16 carries 8 bits, a row of int8 as many or fewer, e4m3 4; a sparse product is rounded to bf16 once more.
    assert 1e-4 < error < (0.04 if "fp8" in rungs else 0.02)


@pytest.mark.parametrize("rungs", [*PREFIXES, *VARIANTS], ids="-".join)
def test_forward_never_waits_for_the_gpu(encoder: ImageEncoderViT, rungs: tuple[str, ...]):
    model, images = built(encoder, rungs), images_of(2)
    model(images)  # compiles, loads kernels, chooses algorithms
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_segment_anything_itself_waits_for_the_gpu(encoder: ImageEncoderViT):
    """So the test above can fail."""
    model, images = copy.deepcopy(encoder).to(GPU), images_of(1)
    model(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            model(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rungs", [rungs for rungs in (*PREFIXES, *VARIANTS) if "compile" in rungs], ids="-".join)
def test_compiled_rung_neither_breaks_graphs_nor_recompiles(encoder: ImageEncoderViT, rungs: tuple[str, ...]):
    deeper = copy.deepcopy(encoder)
    deeper.blocks.extend(copy.deepcopy(encoder.blocks))
    model, batches = built(deeper, rungs), [images_of(1), images_of(2)]
    for images in batches:
        model(images)
    counters = torch._dynamo.utils.counters
    # In fp8 the first block is given no branch and the last adds its own.
    assert counters["stats"]["unique_graphs"] == (6 if "fp8" in rungs else 4) * len(batches)
    assert not counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for images in batches:
            model(images)


def peak_bytes(model: nn.Module, images: torch.Tensor) -> int:
    """Allocated by a forward beyond what was there before."""
    model(images)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(images)
    return torch.cuda.max_memory_allocated() - before


def test_kernels_keep_no_dense_bias(encoder: ImageEncoderViT):
    images = images_of(1).bfloat16()
    bias_bytes = 2 * 4 * 4096**2  # of one global block, 4 heads
    assert peak_bytes(built(encoder, ("bf16", "sdpa")), images) > bias_bytes
    assert peak_bytes(built(encoder, ("bf16", "triton")), images) < bias_bytes / 2


@pytest.mark.parametrize("rungs", [("bf16",), ("triton",), *PREFIXES[1:], *VARIANTS], ids="-".join)
def test_graphs_give_what_plain_calls_give(encoder: ImageEncoderViT, rungs: tuple[str, ...]):
    model = built(encoder, rungs)
    graphed = GraphedEncoder(model, (1, 4), GPU, SIDE_PX)
    graphed.capture()
    for count in (3, 1, 4, 3):  # a smaller graph between larger ones, and a batch that is filled up
        images = images_of(count)
        filled = torch.cat([images, images_of(4 - count)]) if 1 < count < 4 else images
        expected = model(filled)[:count].float()
        assert relative_error(graphed(images), expected) < 1e-3
    with pytest.raises(ValueError, match="at most 4 images, not 5"):
        graphed(images_of(5))


def test_graph_replays_without_waiting(encoder: ImageEncoderViT):
    graphed = GraphedEncoder(built(encoder, TO_FUSED), (1, 2), GPU, SIDE_PX)
    graphed.capture()
    images = images_of(2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphed(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def photograph() -> ClickedPhotograph:
    return load_photograph()


@pytest.mark.parametrize(
    ("asked", "bound"),
    # Magnitude pruning costs vit_t masks, 0.88 with the MLPs pruned; by what layers see in images it keeps 0.96.
    [
        ("fp32", 0.9999),
        ("bf16", 0.99),
        ("auto", 0.99),
        ("int8", 0.985),
        ("fp8", 0.98),
        ("int8_sparse", 0.85),
        ("seed", 0.8),
    ],
)
def test_precision_keeps_the_masks_of_the_shipped_model(photograph: ClickedPhotograph, asked: str, bound: float):
    choice = choose_precision(asked, GPU, "0" * 64)
    sam = photograph.sam
    encoder = copy.deepcopy(sam.image_encoder)
    model = EncoderModel(encoder, sam.pixel_mean, sam.pixel_std, rungs=choice.rungs, device=GPU, batch_sizes=(1, 4))
    model.warm_up()
    width, height = photograph.input_size
    pixels = photograph.pixels[0, :, :height, :width] * sam.pixel_std + sam.pixel_mean
    image = PreparedImage(
        pixels.round().byte().permute(1, 2, 0).contiguous().numpy(), photograph.input_size, photograph.input_size, 0
    )
    embedding, *_, last = model.encode([image] * 5)  # four in one graph, one in the other
    assert isinstance(embedding, torch.Tensor)
    assert isinstance(last, torch.Tensor)
    assert mean_iou(photograph, embedding[None]) >= bound
    assert relative_error(last, embedding) < 1e-3
