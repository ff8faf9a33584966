"""splitsam as a model of osam (https://github.com/wkentaro/osam), and so of labelme: encoded once, kept for everybody.

    import splitsam_model
    splitsam_model.register()

Then `osam.apis.generate` with the model "splitsam" asks the services at 127.0.0.1:50051 and 50052. For services
elsewhere, register a subclass whose `open_client` says where.
"""

import io
from typing import ClassVar

import numpy as np
import osam
from PIL import Image

from splitsam.client import Client, Mask, SplitsamError

_TOP_LEFT, _BOTTOM_RIGHT = 2, 3
_EXPIRED = ("EMBEDDING_EXPIRED", "MODEL_MISMATCH")


class SplitsamModel(osam.types.Model):
    """Runs nothing itself; what osam calls the image's embedding is the key under which the services keep it."""

    name = "splitsam:latest"
    metadata = osam.types.ModelMetadata(
        license_name="Apache License 2.0",
        license_url="https://www.apache.org/licenses/LICENSE-2.0",
        source_url="https://github.com/facebookresearch/segment-anything",
        license_spdx="Apache-2.0",
    )
    _blobs: ClassVar[dict] = {}  # nothing to download

    def __init__(self) -> None:
        super().__init__()
        self._client = self.open_client()

    def open_client(self) -> Client:
        return Client()

    def encode_image(self, image: np.ndarray) -> osam.types.ImageEmbedding:
        """The key of an image [height, width, 3] uint8 RGB, as 32 numbers.

        Raises:
            SplitsamError: the services refused it, or cannot be reached.
        """
        if image.ndim != 3 or image.shape[2] < 3:
            raise ValueError(f"an RGB image is [height, width, 3], not {list(image.shape)}")
        png = io.BytesIO()
        Image.fromarray(image[..., :3]).save(png, "PNG", compress_level=1)
        encoded = self._client.encode(png.getvalue())
        key = np.frombuffer(bytes.fromhex(encoded.key), np.uint8).astype(np.float32)
        return osam.types.ImageEmbedding(
            original_height=encoded.height_px, original_width=encoded.width_px, embedding=key.reshape(1, 1, -1)
        )

    def generate(self, request: osam.types.GenerateRequest) -> osam.types.GenerateResponse:
        """The mask of a prompt, on an image or on what `encode_image` made of one.

        Raises:
            ValueError: there is no image, or the prompt is one of text.
            SplitsamError: the services refused it, or cannot be reached.
        """
        embedding = request.image_embedding
        if embedding is None:
            if request.image is None:
                raise ValueError("an image or its embedding is needed")
            embedding = self.encode_image(request.image)
        prompt = _prompt(request.prompt, embedding)
        try:
            mask = self._client.predict(_key(embedding), **prompt, formats=["bits"])[0]
        except SplitsamError as error:
            if error.reason not in _EXPIRED or request.image is None:
                raise
            embedding = self.encode_image(request.image)
            mask = self._client.predict(_key(embedding), **prompt, formats=["bits"])[0]
        annotations = [] if mask.box is None else [_annotation(mask)]
        return osam.types.GenerateResponse(model=self.name, image_embedding=embedding, annotations=annotations)


def register(model: type[SplitsamModel] = SplitsamModel) -> None:
    """Put the model before those that osam brings."""
    osam.apis.registered_model_types.insert(0, model)


def _key(embedding: osam.types.ImageEmbedding) -> str:
    if embedding.embedding.shape != (1, 1, 32):
        raise ValueError("this embedding was made by another model")
    return embedding.embedding.astype(np.uint8).tobytes().hex()


def _prompt(prompt: osam.types.Prompt | None, embedding: osam.types.ImageEmbedding) -> dict:
    if prompt is None:
        return {"points": [(embedding.original_width / 2, embedding.original_height / 2)]}
    if prompt.points is None or prompt.point_labels is None:
        raise ValueError("this model understands points and boxes, no texts")
    labels = prompt.point_labels
    corners = [prompt.points[labels == label] for label in (_TOP_LEFT, _BOTTOM_RIGHT)]
    if [len(each) for each in corners] not in ([0, 0], [1, 1]):
        raise ValueError("a box is one point labelled 2 and one labelled 3")
    is_click = labels < _TOP_LEFT
    box = np.concatenate(corners).ravel()
    return {
        "points": prompt.points[is_click],
        "labels": labels[is_click].tolist(),
        "box": box if len(box) else None,
    }


def _annotation(mask: Mask) -> osam.types.Annotation:
    x0, y0, x1, y1 = (int(edge) for edge in mask.box)
    bounding_box = osam.types.BoundingBox(xmin=x0, ymin=y0, xmax=x1 - 1, ymax=y1 - 1)
    return osam.types.Annotation(bounding_box=bounding_box, score=mask.score, mask=mask.to_array()[y0:y1, x0:x1])
