"""Runs the decoder's kernels in Triton's CPU interpreter and prints, as JSON, their errors against float32.

A program of its own: the interpreter is chosen when Triton is imported, and the compile tests need the other kind.
"""

import dataclasses
import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import cv2
import numpy as np
import torch
from decoder_support import embedding, image_job, prompt, random_sam

import splitsam.decoder_service.cut_graphs
import splitsam.decoder_service.cutting
from splitsam.decoder_service.cut_graphs import CutGraphs
from splitsam.decoder_service.cutting import Canvas, Cut, Cutter
from splitsam.decoder_service.masks import cut_masks, encode_rle, write_masks
from splitsam.decoder_service.model import DecoderModel
from splitsam.decoder_service.prompts import OutputOptions
from splitsam.kernels.paint_logits import paint_logits, paint_logits_reference
from splitsam.kernels.read_pixels import launch_read_pixels, read_pixels, read_pixels_reference
from splitsam.kernels.write_pixels import write_pixels, write_pixels_reference

PIXELS, WIDTH = 512, 640
DTYPES = (torch.float32, torch.float16)


def shared_sources(prompts: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The addresses of two images in turn, and the images, to be kept alive."""
    images = torch.randn(2, PIXELS, WIDTH).to(dtype)
    return torch.tensor([images[p % 2].data_ptr() for p in range(prompts)]), images


def read_case(dtype: torch.dtype, rows: int, shared: bool, shares: int | None) -> list[torch.Tensor]:
    channels = 128 if shared else 256
    queries = (torch.randn(3, rows, channels) / 8).to(dtype)
    sources, _keep = shared_sources(3, dtype) if shared else (torch.randn(3, PIXELS, 256).to(dtype), None)
    positions = None if shared else torch.randn(PIXELS, 256).to(dtype)
    places = (256, 384, PIXELS, WIDTH) if shared else (0, 0, PIXELS, 256)
    if shares is None:
        found = read_pixels(queries, sources, positions, *places)
    else:
        found = launch_read_pixels(queries, sources, positions, *places, shares)
    same = read_pixels_reference(queries, sources, positions, *places)
    wide = _keep.float() if _keep is not None else sources.float()
    if shared:
        wide = wide[[0, 1, 0]]
    located = positions.float() if positions is not None else None
    return [found, same, read_pixels_reference(queries.float(), wide, located, *places)]


def write_case(dtype: torch.dtype, tokens: int, shared: bool) -> list[torch.Tensor]:
    padded = 8 if tokens <= 8 else 16
    channels = 128 if shared else 256
    rows, written = ((torch.randn(3, 8 * padded, c) / 8).to(dtype) for c in (channels, 256))
    constants = torch.randn(3, 8, padded)
    constants[..., tokens:] = float("-inf")
    constants = constants.flatten(1)
    sources, _keep = shared_sources(3, dtype) if shared else (torch.randn(3, PIXELS, 256).to(dtype), None)
    positions = None if shared else torch.randn(PIXELS, 256).to(dtype)
    norm = [(1 + torch.randn(256) / 4).to(dtype), torch.randn(256).to(dtype)]
    places = (1e-5, 512, PIXELS, WIDTH) if shared else (1e-5, 0, PIXELS, 256)
    found = write_pixels(rows, constants, written, sources, positions, *norm, *places)
    same = write_pixels_reference(rows, constants, written, sources, positions, *norm, *places)
    wide = _keep.float()[[0, 1, 0]] if _keep is not None else sources.float()
    located = positions.float() if positions is not None else None
    exact = [tensor.float() for tensor in (rows, constants, written)]
    norms = [tensor.float() for tensor in norm]
    return [found, same, write_pixels_reference(*exact, wide, located, *norms, *places)]


def paint_case(dtype: torch.dtype, masks: int) -> list[torch.Tensor]:
    shapes = [(1, 4096, 256), (256, 256), (64,), (64,), (64,), (128, 64), (32,)]
    pixels, weight1, bias1, norm, norm_bias, weight2, bias2 = ((torch.randn(s) / 4).to(dtype) for s in shapes)
    hyper = torch.randn(1, masks, 32)
    arguments = [weight1, bias1, norm, norm_bias, 1e-6, weight2, bias2]
    exact = [value.float() if isinstance(value, torch.Tensor) else value for value in arguments]
    found = paint_logits(pixels, hyper, *arguments)
    same = paint_logits_reference(pixels, hyper, *arguments)
    return [found, same, paint_logits_reference(pixels.float(), hyper, *exact)]


CASES = {
    "read shared": (read_case, (64, True, None)),
    "read own": (read_case, (64, False, 1)),
    "read own, many tokens, in shares": (read_case, (128, False, 2)),
    "write shared": (write_case, (7, True)),
    "write own": (write_case, (8, False)),
    "write own, many tokens": (write_case, (11, False)),
    "paint": (paint_case, (3,)),
}


def errors(case: str, dtype: torch.dtype) -> dict[str, float]:
    """Largest errors of the kernel, and of PyTorch in the same dtype, against PyTorch in float32."""
    torch.manual_seed(len(case))
    function, arguments = CASES[case]
    found, same, exact = function(dtype, *arguments)
    return {
        "kernel": float((found - exact).abs().max()),
        "pytorch": float((same - exact).abs().max()),
        "largest": float(exact.abs().max()),
    }


def smooth_logits(seed: int) -> torch.Tensor:
    coarse = torch.randn(1, 1, 12, 12, generator=torch.Generator().manual_seed(seed))
    return 6 * torch.nn.functional.interpolate(coarse, (256, 256), mode="bicubic")[0, 0]


def input_size_of(size: tuple[int, int]) -> tuple[int, int]:
    height, width = (int(1024 / max(size) * side + 0.5) for side in size)
    return height, width


def cut_cases() -> dict[str, tuple[torch.Tensor, tuple[int, int]]]:
    sizes = [(33, 51), (64, 40), (1, 7), (100, 131)]
    cases = {f"{height} x {width}": (smooth_logits(height), (height, width)) for height, width in sizes}
    cases |= {"empty": (torch.full((256, 256), -9.0), (40, 50)), "full": (torch.full((256, 256), 9.0), (65, 50))}
    return cases | {"noise": (20 * torch.randn(256, 256), (70, 90))}


def few_masks_cutter(counts: tuple[int, ...]) -> Cutter:
    """Does what a captured graph does, for masks of up to 128 x 160 pixels."""
    cutter = Cutter(torch.device("cpu"))
    cutter._graphs = CutGraphs(cutter._device, (128, 160), counts)
    cutter._graphs.capture()
    return cutter


def compare_cuts(name: str, cutter: Cutter | None = None, **limits: int) -> dict[str, list[object]]:
    """For each mask of one call what it is, and what it ought to be.

    Args:
        limits: of the modules `cutting` and `cut_graphs`, by name, that hold from now on.
    """
    vars(splitsam.decoder_service.cutting).update(limits)
    vars(splitsam.decoder_service.cut_graphs).update(limits)
    cut = Cut(0.5, 1.0)
    cases = cut_cases()
    logits = [logits.contiguous() for logits, _ in cases.values()]
    canvases = [Canvas(input_size_of(size), size, cut) for _, size in cases.values()]
    addresses = np.array([one.data_ptr() for one in logits])
    made = (cutter or Cutter(torch.device("cpu"))).cut(addresses, np.arange(len(cases)), canvases)
    found = {}
    for case, one, canvas, mask in zip(cases, logits, canvases, made, strict=True):
        sizes = {"input_size": canvas.input_size, "original_size": canvas.original_size}
        options = {"mask_threshold": cut.threshold, "stability_offset": cut.stability_offset}
        [(bitmap, stability)] = cut_masks(one[None], **sizes, **options)
        x, y, width, height = cv2.boundingRect(bitmap)
        box = [x, y, x + width, y + height] if width else None
        measures = [mask.rle.decode(), mask.area_px, mask.stability_score, mask.box and list(mask.box)]
        wanted = [encode_rle(bitmap), int(bitmap.sum()), stability, box]
        found[f"{case}, {name}"] = [measures, wanted, bool((mask.to_bitmap() == bitmap).all())]
    return found


def compare_answers(floor: float | None) -> list[list[str]]:
    """What prompts on two images are answered where masks are cut along the way, and where they are cut afterwards.

    Args:
        floor: of the predicted IoU, for the masks of the first image.
    """
    sizes = [(33, 51), (40, 64), (40, 64)]
    cuts = [Cut(above_iou=floor), Cut(0.02), None]
    jobs = []
    for i, (size, cut) in enumerate(zip(sizes, cuts, strict=True)):
        asked = [prompt(j, size, points=1 + j % 2) for j in range(3)]
        jobs.append(dataclasses.replace(image_job(embedding(i), size, asked), cut=cut))
    model = DecoderModel(random_sam(), "cpu", max_prompts_per_forward=4)
    model._cutter = Cutter(model.device)
    compared = []
    for job, answers in zip(jobs, model.decode(jobs), strict=True):
        options = OutputOptions(mask_threshold=job.cut.threshold if job.cut else 0.0)
        sizes_of_job = {"input_size": job.input_size, "original_size": job.original_size}
        for answer in answers:
            assert (answer.cut is None) == (job.cut is None)
            found = list(write_masks(answer, **sizes_of_job, output=options))
            wanted = list(write_masks(dataclasses.replace(answer, cut=None), **sizes_of_job, output=options))
            if job.cut and job.cut.above_iou is not None:
                wanted = [mask for mask in wanted if mask.predicted_iou > job.cut.above_iou]
            compared.append([repr(found), repr(wanted)])
    return compared


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Painting has one size, the full one, which takes the interpreter long.
    pairs = [(case, dtype) for case in CASES for dtype in DTYPES if case != "paint" or dtype == torch.float32]
    results = {f"{case} {str(dtype).removeprefix('torch.')}": errors(case, dtype) for case, dtype in pairs}
    cuts = compare_cuts("all at once")
    few = few_masks_cutter((2, 8))
    cuts |= compare_cuts("by what a graph does", few)
    cuts |= compare_cuts("with longer texts than fetched", CHARACTERS_PER_RUN=0)
    cuts |= compare_cuts("with more boundaries than guessed", BOUNDARIES_OF_A_MASK=50, BOUNDARIES_AT_ONCE=300)
    cuts |= compare_cuts("with more boundaries than a graph has room for", few_masks_cutter((8,)))
    answers = {str(floor): compare_answers(floor) for floor in (None, 0.0)}
    print(json.dumps({"errors": results, "cuts": cuts, "answers": answers}))
