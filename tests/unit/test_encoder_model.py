"""Embeddings against segment_anything's own preprocessing and encoder, alone and in batches."""

import asyncio
import copy
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import pytest
import torch
import torchvision_shim  # noqa: F401
from PIL import Image

from splitsam.common.errors import CheckpointError, InternalError
from splitsam.common.sam_modules import Sam, assemble_sam
from splitsam.encoder_service.model import EncoderModel
from splitsam.encoder_service.preprocess import ImageLimits, PreparedImage, prepare_image

SMALL, BASE = (192, 3), (768, 12)


def random_sam(width: int, heads: int) -> Sam:
    """A SAM two blocks deep whose position tables, zero when newly built, count."""
    torch.manual_seed(width)
    sam = assemble_sam(
        encoder_embed_dim=width, encoder_depth=2, encoder_num_heads=heads, encoder_global_attn_indexes=[1]
    )
    with torch.no_grad():
        for name, parameter in sam.image_encoder.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                parameter.normal_(std=0.1)
    return sam


def encoder_of(sam: Sam, **options) -> EncoderModel:
    return EncoderModel(copy.deepcopy(sam.image_encoder), sam.pixel_mean, sam.pixel_std, **options)


def random_pixels(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def prepared(width: int, height: int) -> PreparedImage:
    buffer = BytesIO()
    Image.fromarray(random_pixels(width, height)).save(buffer, "PNG", compress_level=1)
    return prepare_image(buffer.getvalue(), ImageLimits())


@torch.inference_mode()
def reference(sam: Sam, width: int, height: int) -> torch.Tensor:
    """What SamPredictor.set_image computes."""
    from segment_anything.utils.transforms import ResizeLongestSide

    resized = ResizeLongestSide(1024).apply_image(random_pixels(width, height))
    image = torch.as_tensor(resized).permute(2, 0, 1).contiguous()[None]
    return sam.image_encoder(sam.preprocess(image))[0]


@pytest.fixture(scope="module")
def small() -> Sam:
    return random_sam(*SMALL)


@pytest.fixture(scope="module")
def model(small: Sam) -> EncoderModel:
    return encoder_of(small)


@pytest.fixture(scope="module")
def embedding(model: EncoderModel) -> torch.Tensor:
    """Of one odd-sized image."""
    return tensors(model.encode([prepared(37, 501)]))[0]


@pytest.fixture(scope="module")
def expected(small: Sam) -> torch.Tensor:
    """The reference for the same image."""
    return reference(small, 37, 501)


def tensors(results: Sequence[torch.Tensor | InternalError]) -> list[torch.Tensor]:
    assert not [result for result in results if isinstance(result, InternalError)]
    return [result for result in results if isinstance(result, torch.Tensor)]


@pytest.mark.parametrize("size", [(1, 1), (1024, 768), (2000, 1333)])
def test_embedding_is_that_of_segment_anything(small: Sam, model: EncoderModel, size: tuple[int, int]):
    (embedding,) = tensors(model.encode([prepared(*size)]))
    assert (embedding.shape, embedding.dtype) == ((256, 64, 64), torch.float32)
    assert embedding.device.type == "cpu"
    assert embedding.is_contiguous()
    assert (embedding - reference(small, *size)).abs().max() <= 1e-4


def test_embedding_of_an_odd_size_depends_on_the_position_tables(
    small: Sam, embedding: torch.Tensor, expected: torch.Tensor
):
    assert (embedding - expected).abs().max() <= 1e-4
    altered = copy.deepcopy(small)
    altered.image_encoder.blocks[0].attn.rel_pos_h.data.zero_()
    assert (embedding - reference(altered, 37, 501)).abs().max() > 1e-3


def test_wide_encoder_agrees_too():
    sam = random_sam(*BASE)
    (embedding,) = tensors(encoder_of(sam).encode([prepared(333, 250)]))
    assert (embedding - reference(sam, 333, 250)).abs().max() <= 1e-4


def test_batch_mates_and_padding_change_nothing(small: Sam, model: EncoderModel, embedding: torch.Tensor):
    images = [prepared(64, 64), prepared(37, 501)]
    for together in (model.encode(images), encoder_of(small, batch_sizes=(3,)).encode(images)):
        assert (tensors(together)[1] - embedding).abs().max() <= 1e-4


class Recorder(torch.nn.Module):
    """An encoder that notes the batches it is given, and fails on an all-white picture."""

    def __init__(self):
        super().__init__()
        self.batches: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        value = images.amin(dim=(1, 2, 3)).reciprocal()
        return value[:, None, None, None].expand(-1, 256, 64, 64)


def plain(value: int) -> PreparedImage:
    return PreparedImage(np.full((1024, 1024, 3), value, np.uint8), (1024, 1024), (1024, 1024), 0)


@pytest.mark.parametrize(
    ("batch_sizes", "count", "seen"),
    [
        ((), 3, [3]),
        ((1, 4), 1, [1]),
        ((4, 1), 3, [4]),
        ((1, 4), 6, [4, 1, 1]),
        ((1, 4), 7, [4, 4]),
        ((4,), 1, [4]),
        ((4, 16), 37, [16, 16, 4, 4]),
    ],
)
def test_batches_have_few_fixed_sizes(batch_sizes: tuple[int, ...], count: int, seen: list[int]):
    recorder = Recorder()
    mean = torch.full((3, 1, 1), -1.0)
    model = EncoderModel(recorder, mean, torch.ones(3, 1, 1), batch_sizes=batch_sizes)
    assert len(model.encode([plain(5)] * count)) == count
    assert recorder.batches == seen
    recorder.batches.clear()
    model.warm_up()
    assert recorder.batches == (sorted(batch_sizes) or [1])


def test_model_whose_embeddings_are_not_finite_does_not_start():
    model = EncoderModel(Recorder(), torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    with pytest.raises(CheckpointError, match="embedding of an empty image is not finite, in batches of 1"):
        model.warm_up()


@pytest.mark.parametrize("batch_sizes", [(), (1, 4)])
def test_batch_of_no_images_is_refused(batch_sizes: tuple[int, ...]):
    model = EncoderModel(Recorder(), torch.zeros(3, 1, 1), torch.ones(3, 1, 1), batch_sizes=batch_sizes)
    with pytest.raises(ValueError, match="a batch needs at least one image"):
        model.encode([])


def test_embedding_that_is_not_finite_fails_its_own_image_only():
    model = EncoderModel(Recorder(), torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    first, second, third = model.encode([plain(4), plain(0), plain(8)])
    assert isinstance(second, InternalError)
    assert [float(one.max()) for one in tensors([first, third])] == [0.25, 0.125]


def test_embeddings_leave_in_the_dtype_asked_for_and_saturate():
    scales = torch.zeros(3, 1, 1), torch.full((3, 1, 1), 1e6)
    model = EncoderModel(Recorder(), *scales, embedding_dtype=torch.float16)
    large, small = tensors(model.encode([plain(4), plain(200)]))
    assert (large.dtype, float(large.max()), float(small.max())) == (torch.float16, 65504.0, 5000.0)


async def test_encoding_on_an_event_loop_gives_the_same(model: EncoderModel, embedding: torch.Tensor):
    first, second = await asyncio.gather(*(model.encode_on_loop([model.pin(prepared(37, 501))]) for _ in range(2)))
    assert torch.equal(tensors(first)[0], embedding)
    assert torch.equal(tensors(second)[0], embedding)


def test_exact_rungs_change_no_embedding(small: Sam, embedding: torch.Tensor):
    model = encoder_of(small, rungs=("sdpa", "triton"))
    assert (tensors(model.encode([prepared(37, 501)]))[0] - embedding).abs().max() <= 1e-4


def test_bf16_rounds_weights_and_answers_in_float32(small: Sam, expected: torch.Tensor):
    model = encoder_of(small, rungs=("fp32", "bf16"))
    (embedding,) = tensors(model.encode([prepared(37, 501)]))
    assert {parameter.dtype for parameter in model.image_encoder.parameters()} == {torch.bfloat16}
    assert embedding.dtype == torch.float32
    # bf16 carries 8 bits: about 1 % in the mean after two blocks; a wrong layer would be off by the values themselves.
    error = (embedding - expected).abs().mean() / expected.abs().mean()
    assert 1e-5 < error < 0.03
