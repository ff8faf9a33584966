import io
import warnings

import cv2
import numpy as np
import pytest
import torch
from decoder_support import input_size_of
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco_mask
from segment_anything.utils import amg

from splitsam.common.sam_modules import Sam
from splitsam.decoder_service import masks
from splitsam.decoder_service.masks import encode_logits, encode_rle, trace_polygons, write_masks
from splitsam.decoder_service.model import PromptLogits
from splitsam.decoder_service.prompts import MaskFormat, OutputOptions

SIZES = [(333, 517), (1024, 1024), (1, 7), (2100, 1400), (40, 1031)]


def smooth_logits(seed, count=3):
    """Blobs of both signs, as a decoder makes them: [count, 256, 256]."""
    coarse = torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(seed))
    return 6 * torch.nn.functional.interpolate(coarse, (256, 256), mode="bicubic")[:, 0]


def written(logits, size, formats=tuple(MaskFormat), **options):
    answer = PromptLogits((1, 2, 3)[: len(logits)], (0.5, 0.25, 0.75)[: len(logits)], logits)
    output = OutputOptions(formats=tuple(formats), **options)
    return list(write_masks(answer, input_size=input_size_of(size), original_size=size, output=output))


def reference_logits(logits, size):
    """`Sam.postprocess_masks` itself, which needs of its model nothing but the side of the input."""
    model = type("Model", (), {"image_encoder": type("Encoder", (), {"img_size": 1024})})
    return Sam.postprocess_masks(model, logits[None], input_size_of(size), size)[0]


def pixels_of(size, counts):
    """What pycocotools reads back; its decode still relies on an `__array__` signature that numpy 2 deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        return coco_mask.decode({"size": list(size), "counts": counts})


def bitmap_of(rings_of, shape):
    canvas = np.zeros(shape, np.uint8)
    for polygon in rings_of:
        piece = np.zeros(shape, np.uint8)
        cv2.fillPoly(piece, [ring.astype(np.int32) for ring in (polygon.outer, *polygon.holes)], 1)
        canvas |= piece
    return canvas


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_masks_and_measures_match_reference(size, threshold):
    logits = smooth_logits(1)
    full = reference_logits(logits, size)
    expected = full > threshold
    stability = amg.calculate_stability_score(full, threshold, 1.0).nan_to_num()
    boxes = amg.batched_mask_to_box(expected)
    for i, mask in enumerate(written(logits, size, mask_threshold=threshold)):
        rle = coco_mask.encode(np.asfortranarray(expected[i].numpy().astype(np.uint8)))
        assert mask.rle_size == tuple(rle["size"])
        assert mask.rle_counts == rle["counts"].decode()
        assert mask.area_px == expected[i].sum()
        assert mask.stability_score == pytest.approx(float(stability[i]), abs=1e-6)
        if mask.area_px:
            assert mask.box == (*boxes[i, :2].tolist(), *(boxes[i, 2:] + 1).tolist())
        assert (mask.mask_index, mask.predicted_iou) == ((1, 0.5), (2, 0.25), (3, 0.75))[i]


@pytest.mark.parametrize("size", SIZES)
def test_png_and_bits_hold_the_pixels_of_the_mask(size):
    for mask in written(smooth_logits(2), size):
        pixels = pixels_of(mask.rle_size, mask.rle_counts)
        with Image.open(io.BytesIO(mask.png)) as image:
            assert image.mode == "L"
            np.testing.assert_array_equal(np.asarray(image), pixels * 255)
        bits = np.unpackbits(np.frombuffer(mask.bits, np.uint8), count=pixels.size, bitorder="little")
        np.testing.assert_array_equal(bits.reshape(size), pixels)


def test_masks_of_a_large_image_are_made_one_at_a_time_with_the_same_result(monkeypatch):
    together = written(smooth_logits(3), (333, 517))
    monkeypatch.setattr(masks, "PIXELS_AT_ONCE", 1000)
    apart = written(smooth_logits(3), (333, 517))
    assert [mask.rle_counts for mask in apart] == [mask.rle_counts for mask in together]
    assert [mask.stability_score for mask in apart] == [mask.stability_score for mask in together]


def test_empty_mask_has_no_box_and_no_polygons():
    [mask] = written(torch.full((1, 256, 256), -20.0), (30, 50))
    assert (mask.area_px, mask.box, mask.stability_score, mask.polygons) == (0, None, 0.0, ())
    assert not pixels_of((30, 50), mask.rle_counts).any()
    assert mask.bits == bytes((30 * 50 + 7) // 8)


def test_formats_not_asked_for_are_none():
    [mask] = written(smooth_logits(4, count=1), (30, 50), formats=[MaskFormat.BITS])
    assert (mask.rle_size, mask.rle_counts, mask.png, mask.polygons, mask.low_res_logits) == (None,) * 5
    assert mask.size_bytes == len(mask.bits) == 188


def test_low_res_logits_are_little_endian_fp16_and_finite():
    logits = smooth_logits(5, count=1)
    logits[0, 0, 0], logits[0, 0, 1] = 1e6, -1e6
    [mask] = written(logits, (30, 50))
    values = np.frombuffer(mask.low_res_logits, "<f2").reshape(256, 256)
    np.testing.assert_array_equal(values[1:], logits[0, 1:].numpy().astype(np.float16))
    assert values[0, :2].tolist() == [65504, -65504]
    assert mask.low_res_logits == encode_logits(logits[0])


def test_polygons_keep_holes_and_pieces_apart():
    bitmap = np.zeros((60, 80), np.uint8)
    bitmap[5:40, 5:40] = 1
    bitmap[10:35, 10:35] = 0
    bitmap[20:25, 20:25] = 1
    bitmap[50:55, 60:75] = 1
    polygons = trace_polygons(bitmap, 0)
    assert sorted(len(polygon.holes) for polygon in polygons) == [0, 0, 1]
    np.testing.assert_array_equal(bitmap_of(polygons, bitmap.shape), bitmap)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 1)))
def test_polygons_without_tolerance_and_rle_round_trip_any_bitmap(bitmap):
    np.testing.assert_array_equal(bitmap_of(trace_polygons(bitmap, 0), bitmap.shape), bitmap)
    decoded = pixels_of(bitmap.shape, encode_rle(bitmap))
    np.testing.assert_array_equal(decoded, bitmap)


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 100.0])
def test_every_piece_keeps_a_ring_of_three_points_at_any_tolerance(tolerance):
    bitmap = np.zeros((20, 20), np.uint8)
    bitmap[2, 2] = bitmap[5, 5:7] = 1
    bitmap[10:18, 10:18] = 1
    polygons = trace_polygons(bitmap, tolerance)
    assert len(polygons) == 3
    assert all(len(polygon.outer) >= 3 for polygon in polygons)
    np.testing.assert_array_equal(bitmap_of(polygons, bitmap.shape), bitmap)


def test_tolerance_bounds_how_far_polygons_stray():
    size = (700, 900)
    for mask in written(smooth_logits(6), size, polygon_tolerance_px=2.0):
        pixels = pixels_of(size, mask.rle_counts)
        exact = trace_polygons(pixels, 0)
        assert sum(len(p.outer) for p in mask.polygons) < sum(len(p.outer) for p in exact) / 4
        strayed = np.pad(bitmap_of(mask.polygons, size) != pixels, 4)
        # Padded, because the edge of the image is an outline too; 3 px are the tolerance and the rounding of fillPoly.
        border = cv2.morphologyEx(np.pad(pixels, 4), cv2.MORPH_GRADIENT, np.ones((7, 7), np.uint8))
        assert strayed.any()
        assert not (strayed & (border == 0)).any()
