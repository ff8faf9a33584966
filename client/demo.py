"""`splitsam demo`: the whole way on one photo, over gRPC, with a table and a picture to show for it."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from splitsam.client.client import Client
from splitsam.client.demo_prompts import DEMO_PROMPTS, DemoPrompt
from splitsam.client.results import DeploymentInfo, EncodedImage, Mask
from splitsam.client.spans import program_span
from splitsam.client.stack import Stack, StackSettings
from splitsam.client.up import DEMO_PHOTO, stop_signals

T = TypeVar("T")
_ENCODE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class _Answer:
    prompt: DemoPrompt
    mask: Mask
    elapsed_ms: float


def run_demo(out: Path, settings: StackSettings, addresses: tuple[str, str] | None) -> None:
    """Encode the photo twice, prompt it, print a table and write the overlay.

    Args:
        out: where the overlay goes; folders are made.
        settings: the stack to start and stop.
        addresses: encoder and decoder of a running stack, to use instead.
    """
    with stop_signals(), ExitStack() as running:
        if addresses is None:
            print("starting Redis, an encoder and a decoder ...", flush=True)
            stack, elapsed_ms = _timed(lambda: running.enter_context(Stack(settings)))
            print(f"ready after {elapsed_ms / 1000:.1f} s\n")
            addresses = (stack.encoder, stack.decoder)
        running.enter_context(program_span("splitsam demo"))
        sam = running.enter_context(Client(*addresses, encode_timeout_s=_ENCODE_TIMEOUT_S))
        print(_about(sam.info()) + "\n")
        first, first_ms = _timed(lambda: sam.encode(DEMO_PHOTO))
        again, again_ms = _timed(lambda: sam.encode(DEMO_PHOTO))
        answers = _ask(sam, again)
        print(_table([(first, first_ms), (again, again_ms)], answers))
        _draw(answers, out)
        print(f"\nwrote {out}")


def _ask(sam: Client, image: EncodedImage) -> list[_Answer]:
    answers: list[_Answer] = []
    for prompt in DEMO_PROMPTS:
        before = answers[-1].mask if prompt.is_refinement else None
        masks, elapsed_ms = _timed(
            lambda prompt=prompt, before=before: sam.predict(  # type: ignore[misc]
                image,
                points=[(x, y) for x, y, _ in prompt.points],
                labels=[label for _, _, label in prompt.points],
                box=prompt.box,
                mask_input=before,
                refinement_tokens=True,
            )
        )
        answers.append(_Answer(prompt, masks[0], elapsed_ms))
    return answers


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    started_s = time.perf_counter()
    result = work()
    return result, (time.perf_counter() - started_s) * 1000


def _about(info: DeploymentInfo) -> str:
    encoder = info.encoder
    note = ": a demonstration model; give --checkpoint for Meta's weights" if encoder.demonstration else ""
    return f"{encoder.model}, {encoder.precision} on {encoder.device}{note}"


def _table(encodes: Sequence[tuple[EncodedImage, float]], answers: Sequence[_Answer]) -> str:
    lines = [f"{'':<34}{'score':>8}{'stability':>11}{'area px':>10}{'ms':>9}"]
    for image, elapsed_ms in encodes:
        how = "found in the cache, not uploaded" if image.cache_hit else "computed"
        lines.append(f"{'encode: ' + how:<63}{elapsed_ms:>9.1f}")
    for answer in answers:
        mask = answer.mask
        scores = f"{mask.score:>8.3f}{mask.stability:>11.3f}{mask.area_px:>10}"
        lines.append(f"{answer.prompt.name:<34}{scores}{answer.elapsed_ms:>9.1f}")
    return "\n".join(lines)


def _draw(answers: Sequence[_Answer], out: Path) -> None:
    from splitsam.client.overlay import Layer, draw_overlay, open_upright

    layers = [
        Layer(
            answer.mask.to_array(),
            f"{answer.prompt.name}, score {answer.mask.score:.2f}",
            points=[(x, y) for x, y, _ in answer.prompt.points],
            labels=[label for _, _, label in answer.prompt.points],
            box=answer.prompt.box,
        )
        for answer in answers
        if answer.prompt.is_drawn
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_overlay(open_upright(DEMO_PHOTO), layers).save(out)
