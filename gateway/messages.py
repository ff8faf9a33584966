"""The messages of the JSON API. Coordinates are pixels (x, y) of the upright image, (0, 0) its top left corner."""

import base64
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from splitsam.client.prompts import GridOptions, OutputOptions
from splitsam.client.results import EncodedImage, Mask

Formats = Annotated[list[Literal["rle", "png", "polygons"]], Field(min_length=1, max_length=3)]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PromptFields(Message):
    """What to look for: at least one point, a box, or a mask to refine."""

    points: list[tuple[FiniteFloat, FiniteFloat]] = Field(
        [], max_length=1024, description="[x, y] each", examples=[[[131, 410]]]
    )
    labels: list[Literal[0, 1]] | None = Field(
        None, description="One for each point: 1 on the object, 0 not on it; all 1 by default"
    )
    box: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat] | None = Field(
        None, description="[x0, y0, x1, y1] around the object"
    )
    refinement_token: str | None = Field(None, max_length=4096, description="Of an earlier mask of this image")

    def prompt(self) -> dict[str, Any]:
        """As the client takes it."""
        return {"points": self.points, "labels": self.labels, "box": self.box, "mask_input": self.refinement_token}


class FormatFields(Message):
    """In which form masks are answered."""

    formats: Formats = Field(["rle"], description="rle (COCO's), png (base64), polygons; any several")
    polygon_tolerance_px: FiniteFloat = Field(1.0, description="How far a polygon may stray from the outline")
    refinement_tokens: bool = Field(False, description="Keep each mask for a while, so that it can be refined")
    mask_threshold: FiniteFloat = Field(0.0, description="Logits above it are inside the mask")

    def options(self) -> OutputOptions:
        """As the client takes it."""
        return OutputOptions(
            formats=list(dict.fromkeys(self.formats)),
            polygon_tolerance_px=self.polygon_tolerance_px,
            refinement_tokens=self.refinement_tokens,
            mask_threshold=self.mask_threshold,
        )


class OutputFields(FormatFields):
    """What to answer with."""

    selection: Literal["auto", "single", "best", "all"] = Field(
        "auto", description="auto: best for one point or a lone box, else single; all: three masks"
    )

    def options(self) -> OutputOptions:
        """As the client takes it."""
        return {**super().options(), "selection": self.selection}


class MasksRequest(PromptFields, OutputFields):
    """A prompt on an image that was opened."""

    key: str = Field(max_length=256, description="What opening the image answered")


class EverythingRequest(FormatFields):
    """How to search an image that was opened; the ranges are the decoder's, which names them."""

    key: str = Field(max_length=256, description="What opening the image answered")
    points_per_side: int | None = Field(None, ge=1, lt=2**31, description="Of the grid; 32 by default")
    predicted_iou_threshold: FiniteFloat | None = Field(None, description="Masks must have more; 0.88 by default")
    stability_score_threshold: FiniteFloat | None = Field(None, description="Masks must have it; 0.95 by default")
    stability_score_offset: FiniteFloat | None = Field(None, description="Of that score, in logits; 1 by default")
    box_nms_threshold: FiniteFloat | None = Field(
        None, description="Of two masks whose boxes have a higher IoU the better one is kept; 0.7 by default"
    )
    min_mask_region_area_px: int | None = Field(
        None, ge=0, lt=2**31, description="Holes and pieces of fewer pixels are removed; 0 by default"
    )

    def grid(self) -> GridOptions:
        """As the client takes it."""
        of_search = self.model_dump(exclude_none=True, exclude={"key", *FormatFields.model_fields})
        return cast(GridOptions, of_search)


class Position(PromptFields):
    """A position of a pointer."""

    id: int = Field(description="The caller's own; its answer carries it")


class PointerStart(OutputFields):
    """The first message of a pointer."""

    key: str = Field(max_length=256, description="What opening the image answered")
    token: str | None = Field(None, max_length=4096, description="Where the gateway asks for tokens")


class ImageAnswer(Message):
    """An image that is open: its embedding is kept under the key."""

    key: str = Field(description="Names the image in all further calls")
    width: int = Field(description="Of the upright image, in pixels")
    height: int
    cache_hit: bool = Field(description="The embedding was there already")
    stored: bool = Field(description="False: the cache is away, and clicks will answer EMBEDDING_EXPIRED")
    model_id: str
    ms: float = Field(description="Milliseconds in the gateway")
    timings: dict[str, float] = Field(description="Milliseconds in the service, by stage")


class PolygonAnswer(Message):
    outer: list[float] = Field(description="x0, y0, x1, y1, ... as in COCO")
    holes: list[list[float]]


class RleAnswer(Message):
    size: tuple[int, int] = Field(description="[height, width]")
    counts: str = Field(description="Compressed, as pycocotools writes them")


class MaskAnswer(Message):
    """One mask; formats that were not asked for are left out."""

    index: int = Field(description="Which of the model's masks: 0 for single, 1 to 3 otherwise")
    score: float = Field(description="The model's estimate of its IoU with the object, about 0 to 1")
    stability: float = Field(description="0 to 1: how little the mask depends on the threshold")
    area: int = Field(description="Pixels")
    box: tuple[float, float, float, float] | None = Field(description="[x0, y0, x1, y1]; null for an empty mask")
    rle: RleAnswer | None = None
    polygons: list[PolygonAnswer] | None = None
    png: str | None = Field(None, description="base64 of an 8-bit grey PNG, 255 inside the mask")
    refinement_token: str | None = None


class MasksAnswer(Message):
    """The masks of a prompt: one, or three for all."""

    width: int
    height: int
    masks: list[MaskAnswer]
    ms: float = Field(description="Milliseconds in the gateway")
    timings: dict[str, float] = Field(description="Milliseconds in the service, by stage")


class ErrorDetail(Message):
    reason: str = Field(description="Stable, upper-case", examples=["EMBEDDING_EXPIRED"])
    message: str = Field(description="One sentence for a person")
    fields: list[dict[str, str]] = Field(description="What was refused: field, description")
    retry_after_ms: int | None = Field(description="How long to wait before a retry; null when none helps")
    request_id: str = Field(description="Names this request in the logs")


class ErrorAnswer(Message):
    """Why there is no other answer."""

    error: ErrorDetail


def image_answer(image: EncodedImage, ms: float) -> dict[str, Any]:
    """`ImageAnswer` of a handle."""
    return {
        "key": image.key,
        "width": image.width_px,
        "height": image.height_px,
        "cache_hit": image.cache_hit,
        "stored": image.stored,
        "model_id": image.model_id,
        "ms": round(ms, 2),
        "timings": rounded(asdict(image.timings)),
    }


def masks_answer(masks: Sequence[Mask]) -> list[dict[str, Any]]:
    """`MaskAnswer` of each mask."""
    return [_mask_answer(mask) for mask in masks]


def _mask_answer(mask: Mask) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "index": mask.index,
        "score": round(mask.score, 6),
        "stability": round(mask.stability, 6),
        "area": mask.area_px,
        "box": mask.box,
    }
    if mask.rle is not None:
        answer["rle"] = mask.rle
    if mask.png is not None:
        answer["png"] = base64.b64encode(mask.png).decode("ascii")
    if mask.polygons is not None:
        answer["polygons"] = [
            {"outer": polygon.outer.ravel().tolist(), "holes": [hole.ravel().tolist() for hole in polygon.holes]}
            for polygon in mask.polygons
        ]
    if mask.refinement_token is not None:
        answer["refinement_token"] = mask.refinement_token
    return answer


def rounded(timings: dict[str, float]) -> dict[str, float]:
    """Milliseconds by stage, without the suffix of their names."""
    return {name.removesuffix("_ms"): round(value, 2) for name, value in timings.items()}
