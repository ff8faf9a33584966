"""The decoder on a GPU: its kernels, its graphs without a wait for the host, and the masks it cuts."""

import asyncio
import dataclasses
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")

import numpy as np
from decoder_support import embedding, image_job, input_size_of, prompt, random_sam, reference

from splitsam.common.codecs import to_fp16
from splitsam.common.transfers import finish
from splitsam.decoder_service.cutting import Canvas, Cut, Cutter
from splitsam.decoder_service.masks import cut_masks, encode_rle
from splitsam.decoder_service.model import DecoderModel, PromptLogits
from splitsam.decoder_service.network import KERNEL_WIDTHS
from splitsam.decoder_service.packing import pack
from splitsam.decoder_service.prompts import Selection
from splitsam.kernels.cut_masks import _cut_kernel
from splitsam.kernels.encode_runs import _encode_kernel
from splitsam.kernels.paint_logits import _paint_kernel, paint_logits, paint_logits_reference
from splitsam.kernels.read_pixels import _join_kernel, _read_kernel, launch_read_pixels, read_pixels_reference
from splitsam.kernels.run_boundaries import _count_kernel, _place_kernel
from splitsam.kernels.write_pixels import _write_kernel, write_pixels, write_pixels_reference

GPU = torch.device("cuda", 0)
SIZE = (333, 517)
PIXELS, WIDTH = 4096, 640
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def jagged_tensors_work(no_gradients: None) -> Iterator[None]:
    """They cannot be made of tensors that were made in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def captured() -> DecoderModel:
    model = DecoderModel(random_sam(), GPU, "bf16", max_prompts_per_forward=8, kernels=True)
    model.capture()
    return model


@pytest.fixture(scope="module")
def launched() -> DecoderModel:
    return DecoderModel(random_sam(), GPU, "bf16", max_prompts_per_forward=8, kernels=True)


def assert_no_worse_than_pytorch(found: torch.Tensor, same: torch.Tensor, exact: torch.Tensor) -> None:
    assert torch.isfinite(found).all()
    ours, theirs = ((tensor.double() - exact).abs().max() for tensor in (found, same))
    assert ours <= 2 * theirs, f"kernel {ours:.2e}, PyTorch {theirs:.2e}"


def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, device=GPU)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shares", [1, 4, 32])
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("shared", [False, True])
def test_reading_kernel_errs_no_more_than_twice_pytorch(shared: bool, rows: int, shares: int, dtype: torch.dtype):
    queries = drawn(5, rows, 128 if shared else 256, scale=0.2).to(dtype)
    values = drawn(2 if shared else 5, PIXELS, WIDTH if shared else 256).to(dtype)
    seen = values[[0, 1, 1, 0, 1]] if shared else values
    sources = torch.tensor([values[i].data_ptr() for i in (0, 1, 1, 0, 1)], device=GPU) if shared else values
    positions = None if shared else drawn(PIXELS, 256).to(dtype)
    places = (256, 384, PIXELS, WIDTH) if shared else (0, 0, PIXELS, 256)
    found = launch_read_pixels(queries, sources, positions, *places, shares)
    same = read_pixels_reference(queries, seen, positions, *places)
    located = positions.double() if positions is not None else None
    assert_no_worse_than_pytorch(found, same, read_pixels_reference(queries.double(), seen.double(), located, *places))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tokens", [5, 7, 8, 11, 16])
@pytest.mark.parametrize("shared", [False, True])
def test_writing_kernel_errs_no_more_than_twice_pytorch(shared: bool, tokens: int, dtype: torch.dtype):
    padded = 8 if tokens <= 8 else 16
    rows = drawn(3, 8 * padded, 128 if shared else 256, scale=0.2).to(dtype)
    written = drawn(3, 8 * padded, 256, scale=0.2).to(dtype)
    constants = drawn(3, 8, padded)
    constants[..., tokens:] = float("-inf")
    constants = constants.flatten(1)
    values = drawn(2 if shared else 3, PIXELS, WIDTH if shared else 256).to(dtype)
    seen = values[[1, 0, 1]] if shared else values
    sources = torch.tensor([values[i].data_ptr() for i in (1, 0, 1)], device=GPU) if shared else values
    positions = None if shared else drawn(PIXELS, 256).to(dtype)
    norm = [drawn(256).to(dtype), drawn(256).to(dtype)]
    places = (1e-5, 512, PIXELS, WIDTH) if shared else (1e-5, 0, PIXELS, 256)
    found = write_pixels(rows, constants, written, sources, positions, *norm, *places)
    same = write_pixels_reference(rows, constants, written, seen, positions, *norm, *places)
    located = positions.double() if positions is not None else None
    wide = [tensor.double() for tensor in (rows, constants, written, seen)]
    norms = [tensor.double() for tensor in norm]
    assert_no_worse_than_pytorch(found, same, write_pixels_reference(*wide, located, *norms, *places))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("masks", [1, 3, 4])
def test_painting_kernel_errs_no_more_than_twice_pytorch(masks: int, dtype: torch.dtype):
    shapes = [(3, 4096, 256), (256, 256), (64,), (64,), (64,), (128, 64), (32,)]
    pixels, weight1, bias1, norm, norm_bias, weight2, bias2 = (drawn(*shape, scale=0.25).to(dtype) for shape in shapes)
    hyper = drawn(3, masks, 32)
    tables = (weight1, bias1, norm, norm_bias, 1e-6, weight2, bias2)
    wide = [table.double() if isinstance(table, torch.Tensor) else table for table in tables]
    exact = paint_logits_reference(pixels.double(), hyper, *wide)
    found, same = paint_logits(pixels, hyper, *tables), paint_logits_reference(pixels, hyper, *tables)
    assert_no_worse_than_pytorch(found, same, exact)


def jobs_of(count: int, selection: Selection | None) -> list:
    """Two images, `count` prompts of every kind with few tokens, mask inputs among them."""
    asked = [prompt(j, SIZE, points=1 + j % 2, box=j % 3 == 2, mask=j % 5 == 4) for j in range(count)]
    return [image_job(embedding(i).half(), SIZE, asked[i::2], selection) for i in range(2)]


@pytest.mark.parametrize("selection", [*Selection, None])
@pytest.mark.parametrize("count", [1, 3, 8, 21])
def test_graphs_answer_as_launches_do(captured, launched, count: int, selection: Selection | None):
    jobs = jobs_of(count, selection)
    for found, expected in zip(captured.decode(jobs), launched.decode(jobs), strict=True):
        for one, other in zip(found, expected, strict=True):
            assert one.mask_indices == other.mask_indices
            # A tile filled up to its graph's size may take other algorithms for its small products.
            torch.testing.assert_close(one.logits, other.logits, atol=0.05 * float(other.logits.abs().max()), rtol=0)


def test_bf16_strays_at_most_twice_as_far_as_the_reference_in_bf16(captured):
    job = image_job(embedding(3).bfloat16(), SIZE, [prompt(j, SIZE, points=1 + j % 3) for j in range(9)], Selection.ALL)
    [answers] = captured.decode([job])
    for asked, answer in zip(job.prompts, answers, strict=True):
        exact, _ = reference(job, asked, multimask=True)
        theirs, _ = reference(job, asked, multimask=True, decoder_context=lambda: torch.autocast("cpu", torch.bfloat16))
        assert (answer.logits.cpu() - exact).abs().mean() <= 2 * (theirs.float() - exact).abs().mean()


def test_fp32_is_exact_on_a_gpu():
    job = image_job(embedding(4), SIZE, [prompt(j, SIZE, points=j, box=j % 2 == 0, mask=j == 3) for j in range(5)])
    [answers] = DecoderModel(random_sam(), GPU, "fp32", kernels=True).decode([job])
    for asked, answer in zip(job.prompts, answers, strict=True):
        single = asked.resolve(None) is Selection.SINGLE
        exact, _ = reference(job, asked, multimask=not single)
        chosen = [index - (not single) for index in answer.mask_indices]
        torch.testing.assert_close(answer.logits.cpu(), exact[chosen], atol=1e-4, rtol=0)


@pytest.mark.parametrize("model", ["captured", "launched"])
def test_a_tile_runs_without_waiting_for_the_gpu_or_growing_its_memory(model, request):
    model = request.getfixturevalue(model)
    image = model.prepare(embedding(5))
    [tile] = pack([image_job(image, SIZE, [prompt(j, SIZE, points=1) for j in range(5)])], 8, KERNEL_WIDTHS)
    for _ in range(3):
        model._runner.run(tile, [image])
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(100):
            model._runner.run(tile, [image])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_reserved() == before


def compiled_kernels() -> int:
    kernels = (_read_kernel, _join_kernel, _write_kernel, _paint_kernel, _cut_kernel, _count_kernel, _place_kernel)
    return sum(len(caches[0]) for kernel in (*kernels, _encode_kernel) for caches in kernel.device_caches.values())


def test_nothing_compiles_for_a_request_once_shapes_are_captured(captured):
    [click] = jobs_of(1, Selection.BEST)[:1]
    captured.decode([dataclasses.replace(click, cut=Cut())])
    before = compiled_kernels()
    assert before > 8
    for count, size in [(1, (40, 60)), (3, (1080, 1920)), (8, (333, 517)), (21, (2100, 700))]:
        for points in range(9):
            asked = [prompt(j, size, points=points, box=points == 0, mask=j % 2 == 1) for j in range(count)]
            captured.decode([dataclasses.replace(image_job(embedding(count).half(), size, asked), cut=Cut())])
    assert compiled_kernels() == before


@pytest.mark.parametrize("count", [1, 3, 8])
def test_mask_inputs_through_a_graph_are_those_launch_by_launch(captured, count: int):
    masks = (10 * torch.randn(count, 1, 256, 256)).half().numpy()
    images = [captured.prepare(embedding(seed)) for seed in range(count)]
    torch.cuda.synchronize()
    assert captured._masked is not None
    assert captured._masked.take(masks)
    for _ in range(2):
        found = captured._masked.prepare(images, masks)
        wanted = captured._network.prepare_masked(images, torch.from_numpy(masks).to(GPU))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.rows, other.rows, atol=0.03, rtol=0.02)  # bf16, and products of other sizes
        images = images[::-1]


def test_logits_come_to_the_host_for_those_who_ask(captured):
    asking, other = jobs_of(5, Selection.BEST)
    asking = dataclasses.replace(asking, on_host=True)
    (brought, beside), (left, _) = (
        captured.decode([job, other]) for job in (asking, dataclasses.replace(asking, on_host=False))
    )
    assert all(answer.logits.device.type == "cpu" for answer in brought)
    assert all(torch.equal(one.logits, to_fp16(two.logits).cpu()) for one, two in zip(brought, left, strict=True))
    assert len(beside) == len(other.prompts)


def test_decoding_on_an_event_loop_gives_the_same_and_lets_others_run(captured):
    asked = {"cut": Cut(), "on_host": True}
    jobs = [
        dataclasses.replace(job, embedding=captured.prepare(job.embedding), **asked)
        for job in jobs_of(5, Selection.BEST)
    ]
    captured.decode(jobs)

    async def decode() -> tuple[list[list[PromptLogits]], int]:
        others_turns = 0
        torch.cuda._sleep(100_000_000)  # clock cycles that the device is busy for, ahead of the work
        decoding = asyncio.create_task(captured.decode_on_loop(jobs))
        while not decoding.done():
            others_turns += 1
            await asyncio.sleep(0)
        return decoding.result(), others_turns

    found, others_turns = asyncio.run(decode())
    for answers, expected in zip(found, captured.decode(jobs), strict=True):
        for answer, other in zip(answers, expected, strict=True):
            assert torch.equal(answer.logits, other.logits)
            assert [mask.rle for mask in answer.cut] == [mask.rle for mask in other.cut]
    assert others_turns > 10


def smooth_logits(seed: int, count: int) -> torch.Tensor:
    coarse = torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(seed))
    return 6 * torch.nn.functional.interpolate(coarse, (256, 256), mode="bicubic")[:, 0].contiguous()


@pytest.mark.parametrize("at_once", [2**25, 10_000])
def test_masks_cut_on_a_gpu_are_those_of_the_cpu(at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("splitsam.decoder_service.cutting.BOUNDARIES_AT_ONCE", at_once)
    sizes = [(1080, 1920), (333, 517), (1, 7), (2100, 1400), (40, 1031), (4097, 33)]
    logits = torch.cat([smooth_logits(1, len(sizes)), 9 * torch.randn(1, 256, 256), torch.full((1, 256, 256), -9.0)])
    sizes += [(700, 900), (64, 64)]
    on_gpu = logits.to(GPU)
    canvases = [Canvas(input_size_of(size), size, Cut(0.25, 1.5)) for size in sizes]
    addresses = np.array([one.data_ptr() for one in on_gpu])
    made = Cutter(GPU).cut(addresses, np.arange(len(sizes)), canvases)
    for one, size, mask in zip(logits, sizes, made, strict=True):
        options = {"mask_threshold": 0.25, "stability_offset": 1.5}
        [(bitmap, stability)] = cut_masks(one[None], input_size=input_size_of(size), original_size=size, **options)
        pixels = mask.to_bitmap()
        assert (pixels == bitmap).mean() >= 0.9999
        assert mask.rle.decode() == encode_rle(pixels)
        assert mask.area_px == pixels.sum()
        rows, columns = np.nonzero(pixels)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else None
        assert mask.box == box
        assert mask.stability_score == pytest.approx(stability, abs=1e-3)


def test_masks_cut_by_a_graph_are_those_cut_launch_by_launch():
    sizes = [(1080, 1920), (1, 7), (4096, 4096), (333, 517)]
    logits = torch.cat([smooth_logits(2, len(sizes)), torch.full((1, 256, 256), -9.0)]).to(GPU)
    sizes.append((64, 64))
    canvases = [Canvas(input_size_of(size), size, Cut(0.25, 1.5)) for size in sizes]
    addresses = np.array([one.data_ptr() for one in logits])
    launched, captured = Cutter(GPU), Cutter(GPU)
    captured.capture()
    picks = [np.array(pick) for pick in ([0], [1, 2], [0, 1, 2, 3, 4], [4], [3] * 16, [0] * 17)]
    begun = [captured.begin(addresses[pick], pick, canvases) for pick in picks]  # none is waited for before the last
    for pick, steps in zip(picks, begun, strict=True):
        found, wanted = finish(steps, GPU), launched.cut(addresses[pick], pick, canvases)
        assert [vars(mask) for mask in found] == [vars(mask) for mask in wanted]


def test_masks_with_more_runs_than_a_graph_has_room_for_are_cut_launch_by_launch():
    noise = 9 * torch.randn(1, 256, 256, generator=torch.Generator().manual_seed(3)).to(GPU)
    canvas = Canvas((1024, 1024), (2000, 2000), Cut())
    arguments = np.array([noise.data_ptr()]), np.zeros(1, np.int64), [canvas]
    captured = Cutter(GPU)
    captured.capture()
    [found], [wanted] = captured.cut(*arguments), Cutter(GPU).cut(*arguments)
    assert len(found.rle) > 2 * 8192
    assert vars(found) == vars(wanted)


def test_no_kernel_runs_unasked(monkeypatch: pytest.MonkeyPatch):
    def unasked(*_: object) -> None:
        raise AssertionError("a kernel ran without --kernels")

    for name in ("read_pixels", "write_pixels", "paint_logits", "cut_masks"):
        monkeypatch.setattr(f"splitsam.kernels.{name}.{name}", unasked)
    model = DecoderModel(random_sam(), GPU, "bf16", max_prompts_per_forward=8)
    model.capture()
    job = dataclasses.replace(image_job(embedding(0), SIZE, [prompt(0, SIZE, points=1)]), cut=Cut())
    [[answer]] = model.decode([job])
    assert answer.cut is None
    assert answer.logits.isfinite().all()
