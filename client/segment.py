"""`splitsam segment`: masks for one prompt on one image, or of everything in it, as a table, JSON or an overlay."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from splitsam.client.client import Client
from splitsam.client.overlay import Layer, draw_overlay, open_upright
from splitsam.client.prompts import GridOptions
from splitsam.client.results import EncodedImage, Mask

Points = list[tuple[float, float, int]]
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_POINT = re.compile(rf"{_NUMBER},{_NUMBER}(?::([01]))?")
_BOX = re.compile(",".join([_NUMBER] * 4))


def parse_points(texts: Sequence[str]) -> Points:
    """Parse `x,y`, `x,y:1` or `x,y:0` into x, y and label.

    Raises:
        typer.BadParameter: a text is not of that form.
    """
    points: Points = []
    for text in texts:
        match = _POINT.fullmatch(text)
        if match is None:
            raise typer.BadParameter(f"--point takes x,y or x,y:0 or x,y:1, not {text!r}")
        points.append((float(match[1]), float(match[2]), int(match[3] or 1)))
    return points


def parse_box(text: str) -> tuple[float, ...]:
    """Parse `x0,y0,x1,y1`.

    Raises:
        typer.BadParameter: the text is not of that form.
    """
    match = _BOX.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"--box takes x0,y0,x1,y1, not {text!r}")
    return tuple(float(edge) for edge in match.groups())


def parse_grid(
    points_per_side: int | None,
    min_score: float | None,
    min_stability: float | None,
    crop_layers: int | None,
    others: Sequence[str],
) -> GridOptions:
    """The options of everything mode that were given.

    Args:
        others: `name=value` with a name of `GridOptions` and a value in JSON.

    Raises:
        typer.BadParameter: one of those is not of that form.
    """
    grid: GridOptions = {}
    for text in others:
        name, _, value = text.partition("=")
        if name not in GridOptions.__annotations__:
            known = ", ".join(GridOptions.__annotations__)
            raise typer.BadParameter(f"--set takes name=value, and of names {known}; not {text!r}")
        try:
            grid[name] = json.loads(value)  # type: ignore[literal-required]
        except ValueError:
            raise typer.BadParameter(f"--set takes a number or a list in JSON, not {text!r}") from None
    if points_per_side is not None:
        grid["points_per_side"] = points_per_side
    if min_score is not None:
        grid["predicted_iou_threshold"] = min_score
    if min_stability is not None:
        grid["stability_score_threshold"] = min_stability
    if crop_layers is not None:
        grid["crop_layers"] = crop_layers
    return grid


def run_segment(
    client: Client,
    path: Path,
    points: Points,
    box: Sequence[float] | None,
    *,
    all_masks: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Encode, predict, and show what was asked for."""
    image = client.encode(path)
    masks = client.predict(
        image,
        points=[(x, y) for x, y, _ in points],
        labels=[label for _, _, label in points],
        box=box,
        selection="all" if all_masks else "auto",
    )
    if out is not None:
        _draw_prompt(path, masks, points, box, out)
    if as_json:
        print(json.dumps(_as_json(path, image, [_mask_as_json(mask) for mask in masks])))
        return
    for mask in masks:
        print(describe(mask))
    if out is not None:
        print(f"wrote {out}")


def run_everything(client: Client, path: Path, grid: GridOptions, *, out: Path | None, as_json: bool) -> None:
    """Encode, find every mask, and show what was asked for."""
    image = client.encode(path)
    found = list(client.generate(image, **grid))
    if out is not None:
        # Small masks are drawn last, over the large ones that they lie on.
        by_area = sorted(found, key=lambda one: one.mask.area_px, reverse=True)
        _draw(path, [Layer(one.mask.to_array()) for one in by_area], out)
    if as_json:
        masks = [_mask_as_json(one.mask) | {"point": one.point} for one in found]
        print(json.dumps(_as_json(path, image, masks)))
        return
    for one in found:
        print(describe(one.mask))
    hint = "" if found else "; try a lower --min-score and --min-stability"
    print(f"{len(found)} masks{hint}")
    if out is not None:
        print(f"wrote {out}")


def describe(mask: Mask) -> str:
    """One line about a mask."""
    box = "empty" if mask.box is None else "box " + ",".join(f"{edge:g}" for edge in mask.box)
    scores = f"score {mask.score:.3f}  stability {mask.stability:.3f}"
    return f"mask {mask.index}  {scores}  area {mask.area_px} px  {box}"


def _draw_prompt(path: Path, masks: Sequence[Mask], points: Points, box: Sequence[float] | None, out: Path) -> None:
    prompt: dict[str, Any] = {
        "points": [(x, y) for x, y, _ in points],
        "labels": [label for _, _, label in points],
        "box": box,
    }
    layers = [
        Layer(mask.to_array(), f"mask {mask.index}, score {mask.score:.2f}", **(prompt if mask is masks[0] else {}))
        for mask in masks
    ]
    _draw(path, layers, out)


def _draw(path: Path, layers: Sequence[Layer], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_overlay(open_upright(path), layers).save(out)


def _as_json(path: Path, image: EncodedImage, masks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "image": str(path),
        "embedding_key": image.key,
        "width_px": image.width_px,
        "height_px": image.height_px,
        "cache_hit": image.cache_hit,
        "masks": masks,
    }


def _mask_as_json(mask: Mask) -> dict[str, Any]:
    return {
        "index": mask.index,
        "score": mask.score,
        "stability": mask.stability,
        "area_px": mask.area_px,
        "box": mask.box,
        "rle": mask.rle,
    }
