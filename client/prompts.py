"""What a caller asks for: prompts, and which masks in which formats."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict

import numpy as np

from splitsam.client.results import LOW_RES_SHAPE, EncodedImage, Mask
from splitsam.v1 import decoder_pb2 as pb

Selection = Literal["auto", "single", "best", "all"]
Format = Literal["rle", "png", "polygons", "bits", "low_res_logits"]
Image = EncodedImage | str
MaskInput = Mask | str | bytes | np.ndarray[Any, Any]

_SELECTIONS = {
    "auto": pb.MASK_SELECTION_UNSPECIFIED,
    "single": pb.MASK_SELECTION_SINGLE,
    "best": pb.MASK_SELECTION_BEST,
    "all": pb.MASK_SELECTION_ALL,
}
_FORMATS = {
    "rle": pb.MASK_FORMAT_RLE,
    "png": pb.MASK_FORMAT_PNG,
    "polygons": pb.MASK_FORMAT_POLYGONS,
    "bits": pb.MASK_FORMAT_BITS,
    "low_res_logits": pb.MASK_FORMAT_LOW_RES_LOGITS,
}
_LABELS = {1: pb.POINT_LABEL_FOREGROUND, 0: pb.POINT_LABEL_BACKGROUND}


class OutputOptions(TypedDict, total=False):
    """What to answer with; every entry may be left out.

    selection: which masks: "single" (mask token 0), "best" of three, "all" three; "auto" (default) is best for
        one point or a lone box, else single.
    formats: any of "rle" (default), "png", "polygons", "bits", "low_res_logits".
    polygon_tolerance_px: how far a polygon may stray from the outline; default 1.
    refinement_tokens: keep the logits on the server for a while, so that a mask can be refined; default False.
    mask_threshold: logits above it are inside the mask; default 0.
    """

    selection: Selection
    formats: Sequence[Format]
    polygon_tolerance_px: float
    refinement_tokens: bool
    mask_threshold: float


class GridOptions(TypedDict, total=False):
    """How everything mode searches; every entry may be left out, the defaults are those of segment_anything.

    points_per_side: points along each side of the grid; default 32.
    point_grid: [N, 2] points (x, y) as fractions of the image's width and height, in place of points_per_side.
    points_per_batch: points decoded in one piece; at most, and by default, what the server decodes at once.
    predicted_iou_threshold: masks must have a higher predicted IoU; default 0.88.
    stability_score_threshold: masks with a lower stability score are dropped; default 0.95.
    stability_score_offset: how far the stability score looks around the mask threshold, in logits; default 1.
    box_nms_threshold: of two masks whose boxes have a higher IoU the better one is kept; default 0.7.
    crop_nms_threshold: the same between masks of different crops, the smaller crop's being the better; default 0.7.
        The greater of the two holds after small regions were removed.
    min_mask_region_area_px: holes and pieces of fewer pixels are removed; default 0.
    crop_layers: how many times the image is cut into ever smaller crops that are searched as well; default 0. Others
        need the image itself: what `encode` returned, not a key.
    crop_overlap_ratio: how far crops reach into each other, as a fraction of the shorter side; default 512 / 1500.
    crop_points_downscale_factor: each layer's points along a side are those of the one before divided by it; default 1.
    crop_point_grids: with point_grid, one such grid for the crops of each layer.
    """

    points_per_side: int
    point_grid: Sequence[Sequence[float]] | np.ndarray[Any, Any]
    points_per_batch: int
    predicted_iou_threshold: float
    stability_score_threshold: float
    stability_score_offset: float
    box_nms_threshold: float
    crop_nms_threshold: float
    min_mask_region_area_px: int
    crop_layers: int
    crop_overlap_ratio: float
    crop_points_downscale_factor: int
    crop_point_grids: Sequence[Sequence[Sequence[float]] | np.ndarray[Any, Any]]


@dataclass(frozen=True, eq=False)
class Prompt:
    """What to look for on an image: at least one point, a box or a mask.

    Args:
        points: [N, 2] pixels (x, y) of the upright image.
        labels: [N] 1 (on the object) or 0 (not on it), as in SAM; all 1 by default.
        box: x0, y0, x1, y1 pixels of the upright image.
        mask_input: a `Mask` to refine (through its token, or the logits it carries), a refinement token, or
            logits [256, 256] as an array or as fp16 bytes.
    """

    points: Sequence[Sequence[float]] | np.ndarray[Any, Any] = ()
    labels: Sequence[int] | np.ndarray[Any, Any] | None = None
    box: Sequence[float] | np.ndarray[Any, Any] | None = None
    mask_input: MaskInput | None = None

    def to_message(self) -> pb.Prompt:
        """The prompt on the wire; ranges are left to the server, which names its limits."""
        message = pb.Prompt()
        labels = [1] * len(self.points) if self.labels is None else list(self.labels)
        if len(labels) != len(self.points):
            raise ValueError(f"{len(self.points)} points need as many labels, not {len(labels)}")
        for (x, y), label in zip(self.points, labels, strict=True):
            if label not in _LABELS:
                raise ValueError(f"a label is 1 (foreground) or 0 (background), not {label}")
            message.points.add(x=x, y=y, label=_LABELS[label])
        if self.box is not None:
            x0, y0, x1, y1 = self.box
            message.box.CopyFrom(pb.Box(x0=x0, y0=y0, x1=x1, y1=y1))
        if self.mask_input is not None:
            _set_mask_input(message, self.mask_input)
        return message

    def without_token(self) -> "Prompt | None":
        """The same prompt for a decoder that no longer has its token's logits; None when nothing would be left.

        The logits themselves are sent where the mask carries them; else the prompt loses its mask.
        """
        if isinstance(self.mask_input, Mask) and self.mask_input.refinement_token is not None:
            return replace(self, mask_input=self.mask_input.low_res_logits)._if_any()
        return replace(self, mask_input=None)._if_any() if isinstance(self.mask_input, str) else self

    def _if_any(self) -> "Prompt | None":
        return self if len(self.points) or self.box is not None or self.mask_input is not None else None


Prompts = tuple[Image, Sequence[Prompt]]


def key_of(image: Image) -> str:
    """The embedding key of a handle, or the key itself."""
    return image if isinstance(image, str) else image.key


def predict_request(
    images: Sequence[Prompts], output: pb.OutputOptions, *, background: bool = False
) -> pb.PredictMasksRequest:
    """The prompts on the wire."""
    return pb.PredictMasksRequest(
        images=[
            pb.ImagePrompts(embedding_key=key_of(image), prompts=[prompt.to_message() for prompt in prompts])
            for image, prompts in images
        ],
        output=output,
        background=background,
    )


def output_message(options: OutputOptions) -> pb.OutputOptions:
    """The options on the wire."""
    message = pb.OutputOptions(
        formats=[_named(_FORMATS, "format", name) for name in options.get("formats", ("rle",))],
        selection=_named(_SELECTIONS, "selection", options.get("selection", "auto")),
        refinement_tokens=options.get("refinement_tokens", False),
        mask_threshold=options.get("mask_threshold", 0.0),
    )
    if "polygon_tolerance_px" in options:
        message.polygon_tolerance_px = options["polygon_tolerance_px"]
    return message


def everything_message(source: str | bytes, grid: GridOptions, output: pb.OutputOptions) -> pb.GenerateMasksRequest:
    """Everything mode on the wire; ranges are left to the server, which names its limits.

    Args:
        source: an embedding key, or the bytes of an image file.
    """
    own_grids = ("point_grid", "crop_point_grids")
    options: dict[str, Any] = {name: value for name, value in grid.items() if name not in own_grids}
    options["embedding_key" if isinstance(source, str) else "image"] = source
    try:
        message = pb.GenerateMasksRequest(output=output, **options)
        message.point_grid.extend(_flat(grid.get("point_grid", ())))
        for of_crops in grid.get("crop_point_grids", ()):
            message.crop_point_grids.add(xy=_flat(of_crops))
    except TypeError as error:
        raise ValueError(f"an option of everything mode is of the wrong type: {error}") from error
    return message


def _flat(points: Sequence[Sequence[float]] | np.ndarray[Any, Any]) -> list[float]:
    return [side for x, y in points for side in (x, y)]


def _named(known: dict[str, Any], what: str, name: str) -> Any:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: one of {', '.join(known)}")
    return known[name]


def _set_mask_input(message: pb.Prompt, mask_input: MaskInput) -> None:
    match mask_input:
        case str():
            message.refinement_token = mask_input
        case bytes():
            message.low_res_logits = mask_input
        case Mask(refinement_token=str(token)):
            message.refinement_token = token
        case Mask(low_res_logits=bytes(logits)):
            message.low_res_logits = logits
        case Mask():
            raise ValueError("this mask cannot be refined: ask for refinement_tokens=True when predicting it")
        case _:
            logits_array = np.asarray(mask_input)
            if logits_array.size != LOW_RES_SHAPE[0] * LOW_RES_SHAPE[1]:
                raise ValueError(f"logits are [256, 256], not {list(logits_array.shape)}")
            message.low_res_logits = logits_array.astype("<f2").tobytes()
