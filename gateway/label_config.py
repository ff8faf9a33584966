"""What a Label Studio project's labeling configuration says of images, prompts and masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree

from splitsam.gateway.errors import GatewayError

_KINDS: dict[str, tuple[Literal["brush", "polygon"], bool]] = {
    "BrushLabels": ("brush", True),
    "PolygonLabels": ("polygon", True),
    "Brush": ("brush", False),
    "Polygon": ("polygon", False),
}


@dataclass(frozen=True)
class Control:
    """A tag that holds masks.

    Args:
        labels: those of the tag; None for a tag that has none.
    """

    name: str
    kind: Literal["brush", "polygon"]
    labels: tuple[str, ...] | None

    @property
    def region_type(self) -> str:
        return self.kind if self.labels is None else f"{self.kind}labels"


@dataclass(frozen=True)
class LabelConfig:
    """The image of a project and the tags that can hold its masks, brushes first.

    Args:
        data_key: under which a task has the image's address.
    """

    image_name: str
    data_key: str
    controls: Sequence[Control]

    def control_for(self, label: str | None) -> Control:
        """The tag for the mask of an object with this label.

        Raises:
            GatewayError: no tag has the label.
        """
        for control in self.controls:
            if label is None or control.labels is None or label in control.labels:
                return control
        raise _unusable(f"No BrushLabels or PolygonLabels of this project's labeling setup has the label {label!r}.")


def parse_config(text: str) -> LabelConfig:
    """Read a labeling configuration.

    Raises:
        GatewayError: it has no image, or no tag that can hold a mask.
    """
    if "<!" in text.replace("<!--", ""):  # entities and document types: nothing that Label Studio writes
        raise _unusable("This project's labeling setup holds what is not read here: <!...>.")
    try:
        root = ElementTree.fromstring(text)  # noqa: S314 (no entities are left)
    except ElementTree.ParseError as error:
        raise _unusable("This project's labeling setup cannot be read.") from error
    images = [tag for tag in root.iter("Image") if tag.get("name") and tag.get("value", "").startswith("$")]
    if not images:
        raise _unusable("This project's labeling setup has no Image tag whose value is one image of the task.")
    for image in images:
        found = [tag for tag in root.iter() if tag.tag in _KINDS and tag.get("toName") == image.get("name")]
        controls = sorted((_control(tag) for tag in found), key=lambda control: control.kind)
        if controls:
            return LabelConfig(image.attrib["name"], image.attrib["value"][1:], controls)
    raise _unusable(
        "This project's labeling setup has nothing that can hold a mask: add BrushLabels or PolygonLabels to it."
    )


def _control(tag: ElementTree.Element) -> Control:
    kind, has_labels = _KINDS[tag.tag]
    labels = tuple(label.get("alias") or label.get("value") or "" for label in tag.iter("Label"))
    return Control(tag.get("name", ""), kind, labels if has_labels else None)


def _unusable(message: str) -> GatewayError:
    return GatewayError(400, "LABEL_CONFIG_UNUSABLE", message)
