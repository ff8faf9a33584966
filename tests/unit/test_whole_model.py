"""A whole model, from image to masks, against segment_anything's own predictor in fp32."""

from io import BytesIO

import numpy as np
import pytest
import torch
import torchvision_shim  # noqa: F401
from PIL import Image

from splitsam.common.architectures import ARCHITECTURES, build_sam
from splitsam.common.sam_modules import Sam
from splitsam.decoder_service.masks import upsample_logits
from splitsam.decoder_service.model import DecoderModel
from splitsam.decoder_service.packing import ImageJob
from splitsam.decoder_service.prompts import Prompt, Selection
from splitsam.encoder_service.model import EncoderModel
from splitsam.encoder_service.preprocess import ImageLimits, prepare_image

from segment_anything.predictor import SamPredictor  # isort: skip  (splitsam makes it importable)

WIDTH, HEIGHT = 333, 251


def random_model(name: str) -> Sam:
    """Seeded weights whose position tables, zero when newly built, count."""
    torch.manual_seed(0)
    sam = build_sam(ARCHITECTURES[name])
    with torch.no_grad():
        for parameter_name, parameter in sam.image_encoder.named_parameters():
            if "rel_pos" in parameter_name or "pos_embed" in parameter_name:
                parameter.normal_(std=0.1)
    return sam


@pytest.mark.parametrize("name", ["vit_t", pytest.param("vit_b", marks=pytest.mark.long)])
def test_whole_model_predicts_what_the_predictor_predicts(name: str):
    sam = random_model(name)
    pixels = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    predictor = SamPredictor(sam)
    predictor.set_image(pixels)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    prepared = prepare_image(file.getvalue(), ImageLimits())
    decoder = DecoderModel(sam, "cpu")
    (embedding,) = EncoderModel(sam.image_encoder, sam.pixel_mean, sam.pixel_std).encode([prepared])
    assert isinstance(embedding, torch.Tensor)
    assert (embedding - predictor.get_image_embedding()[0]).abs().max() <= 1e-4

    rng = np.random.default_rng(2)
    points = [rng.uniform((0, 0), (WIDTH, HEIGHT), (1 + i % 3, 2)).astype(np.float32) for i in range(5)]
    labels = [rng.integers(0, 2, len(one)) for one in points]
    prompts = tuple(Prompt(one, label) for one, label in zip(points, labels, strict=True))
    input_size = (prepared.input_size[1], prepared.input_size[0])
    (answers,) = decoder.decode([ImageJob(embedding, (HEIGHT, WIDTH), input_size, prompts, Selection.ALL)])
    for one, label, answer in zip(points, labels, answers, strict=True):
        masks, iou, logits = predictor.predict(one, label, multimask_output=True)
        np.testing.assert_allclose(answer.logits.numpy(), logits, atol=1e-4, rtol=0)
        np.testing.assert_allclose(answer.predicted_iou, iou, atol=1e-4, rtol=0)
        full = upsample_logits(answer.logits, input_size=input_size, original_size=(HEIGHT, WIDTH))
        assert ((full > 0).numpy() == masks).mean() >= 0.9999
