import functools

import numpy as np
import pytest
import torch
from decoder_support import SamPredictor, embedding, image_job, prompt, random_sam, reference

from splitsam.decoder_service.graphs import TileRunner
from splitsam.decoder_service.masks import upsample_logits, write_masks
from splitsam.decoder_service.model import DecoderModel
from splitsam.decoder_service.network import KERNEL_WIDTHS, Network
from splitsam.decoder_service.packing import ImageJob, pack
from splitsam.decoder_service.prompts import OutputOptions, Prompt, Selection

ODD_SIZE = (333, 517)
# Other batch shapes take other blockings of the matrix products, so the last bits of fp32 may differ and no more.
ROUNDING = 1e-6
KINDS = {
    "point": {"points": 1},
    "points": {"points": 5},
    "many points": {"points": 30},
    "box": {"box": True},
    "both": {"points": 3, "box": True},
    "mask": {"mask": True},
    "point and mask": {"points": 1, "mask": True},
    "all": {"points": 2, "box": True, "mask": True},
    "many points and mask": {"points": 17, "mask": True},
}


@pytest.fixture(scope="module")
def model():
    return DecoderModel(random_sam(), "cpu", max_prompts_per_forward=4)


def assert_parity(job, answers):
    height, width = job.original_size
    for asked, answer in zip(job.prompts, answers, strict=True):
        single = asked.resolve(job.selection) is Selection.SINGLE
        logits, iou = reference(job, asked, multimask=not single)
        chosen = [index - (not single) for index in answer.mask_indices]
        torch.testing.assert_close(answer.logits, logits[chosen], atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(answer.predicted_iou), iou[chosen], atol=1e-4, rtol=0)
        sizes = {"input_size": job.input_size, "original_size": (height, width)}
        ours, theirs = (upsample_logits(x, **sizes) > 0 for x in (answer.logits, logits[chosen]))
        assert (ours == theirs).float().mean() >= 0.9999


def test_decode_matches_reference_for_each_kind_of_prompt(model):
    prompts = [prompt(seed, ODD_SIZE, **kind) for seed, kind in enumerate(KINDS.values())]
    job = image_job(embedding(0), ODD_SIZE, prompts, Selection.ALL)
    [answers] = model.decode([job])
    assert_parity(job, answers)
    assert all(answer.mask_indices == (1, 2, 3) for answer in answers)


def test_decode_matches_reference_for_ragged_batch_of_mixed_prompts(model):
    sizes, counts = [(1024, 681), (77, 1301), (640, 480)], [1, 9, 40]
    kinds = list(KINDS.values())
    jobs = []
    for i, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        asked = [prompt(100 * i + j, size, **kinds[j % len(kinds) if j % 2 else 0]) for j in range(count)]
        jobs.append(image_job(embedding(i), size, asked))
    for job, answers in zip(jobs, model.decode(jobs), strict=True):
        assert_parity(job, answers)


def test_decode_matches_predictor_from_image_to_mask(model):
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (211, 307, 3), dtype=np.uint8)
    predictor = SamPredictor(random_sam())
    predictor.set_image(image)
    asked = prompt(5, image.shape[:2], points=2, box=True)
    masks, iou, _ = predictor.predict(asked.points, asked.labels, asked.box, return_logits=True)
    sizes = {"input_size": predictor.input_size, "original_size": predictor.original_size}
    job = ImageJob(predictor.features[0], prompts=(asked,), selection=Selection.ALL, **sizes)
    [[answer]] = model.decode([job])
    np.testing.assert_allclose(upsample_logits(answer.logits, **sizes).numpy(), masks, atol=1e-4)
    np.testing.assert_allclose(answer.predicted_iou, iou, atol=1e-4)
    areas = [mask.area_px for mask in write_masks(answer, output=OutputOptions(), **sizes)]
    np.testing.assert_allclose(areas, (masks > 0).sum((1, 2)), atol=masks[0].size * 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_mates_never_change_logits(model, kind):
    asked = prompt(1, ODD_SIZE, **KINDS[kind])
    job = image_job(embedding(1), ODD_SIZE, [asked], Selection.BEST)
    [[alone]] = model.decode([job])
    mates = [prompt(2, ODD_SIZE, points=1), prompt(3, ODD_SIZE, **KINDS[kind])]
    crowd = [
        image_job(embedding(2), ODD_SIZE, mates, Selection.ALL),
        image_job(job.embedding, ODD_SIZE, [*mates, asked], Selection.BEST),
    ]
    accompanied = model.decode(crowd)[1][2]
    assert accompanied.mask_indices == alone.mask_indices
    assert (accompanied.logits - alone.logits).abs().max() <= ROUNDING
    assert accompanied.predicted_iou == pytest.approx(alone.predicted_iou, abs=ROUNDING)


@pytest.mark.parametrize("cap", [1, 2, 64])
def test_cap_on_prompts_per_forward_changes_nothing(model, cap):
    asked = [prompt(j, ODD_SIZE, points=1 + j % 2, mask=j == 3) for j in range(7)]
    jobs = [image_job(embedding(4), ODD_SIZE, asked[:4]), image_job(embedding(5), ODD_SIZE, asked[4:])]
    capped = DecoderModel(random_sam(), "cpu", max_prompts_per_forward=cap)
    for answers, expected in zip(capped.decode(jobs), model.decode(jobs), strict=True):
        for answer, other in zip(answers, expected, strict=True):
            assert answer.mask_indices == other.mask_indices
            assert (answer.logits - other.logits).abs().max() <= ROUNDING


async def test_decoding_on_an_event_loop_gives_the_same(model):
    jobs = [image_job(embedding(j), ODD_SIZE, [prompt(j, ODD_SIZE, points=1, mask=j == 1)]) for j in range(3)]
    on_loop = await model.decode_on_loop(jobs)
    for [answer], [other] in zip(on_loop, model.decode(jobs), strict=True):
        assert torch.equal(answer.logits, other.logits)
        assert not answer.logits.requires_grad
    assert torch.is_grad_enabled()


class SmallDevice(DecoderModel):
    """Runs out of memory with more than two prompts in a forward pass, or more than `most`."""

    most = 2

    def _forward(self, tile, jobs):
        if len(tile.wanted) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super()._forward(tile, jobs)


def test_job_that_does_not_fit_is_decoded_in_smaller_tiles(model):
    job = image_job(embedding(4), ODD_SIZE, [prompt(j, ODD_SIZE, points=1) for j in range(5)])
    small = SmallDevice(random_sam(), "cpu", max_prompts_per_forward=64)
    for answer, other in zip(small.decode([job])[0], model.decode([job])[0], strict=True):
        assert (answer.logits - other.logits).abs().max() <= ROUNDING
    with pytest.raises(torch.OutOfMemoryError):
        small.decode([job, job])  # the batcher cuts first
    small.most = 0
    with pytest.raises(torch.OutOfMemoryError):
        small.decode([job])


def test_selection_decides_which_mask_tokens_answer(model):
    asked = [prompt(8, ODD_SIZE, points=1), prompt(9, ODD_SIZE, points=2)]
    jobs = [image_job(embedding(6), ODD_SIZE, asked, selection) for selection in (*Selection, None)]
    single, best, every, default = model.decode(jobs)
    assert [answer.mask_indices for answer in single] == [(0,), (0,)]
    for one, three in zip(best, every, strict=True):
        assert one.mask_indices == (1 + int(np.argmax(three.predicted_iou)),)
        assert one.predicted_iou[0] == pytest.approx(max(three.predicted_iou), abs=ROUNDING)
    assert [answer.mask_indices for answer in default] == [best[0].mask_indices, (0,)]


def test_bf16_strays_at_most_twice_as_far_as_reference_in_bf16():
    job = image_job(embedding(7).bfloat16(), ODD_SIZE, [prompt(10, ODD_SIZE, points=2)], Selection.ALL)
    exact, _ = reference(job, job.prompts[0], multimask=True)
    [[answer]] = DecoderModel(random_sam(), "cpu", "bf16").decode([job])
    bf16 = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    theirs, _ = reference(job, job.prompts[0], multimask=True, decoder_context=bf16)
    assert answer.logits.dtype is torch.float32
    assert (answer.logits - exact).abs().mean() <= 2 * (theirs.float() - exact).abs().mean()


def test_precision_of_service_leaves_weights_of_sam_alone():
    before = {name: value.clone() for name, value in random_sam().state_dict().items()}
    DecoderModel(random_sam(), "cpu", "bf16").decode([image_job(embedding(0), (9, 9), [prompt(0, (9, 9), points=1)])])
    for name, value in random_sam().state_dict().items():
        assert value.dtype is torch.float32
        assert torch.equal(value, before[name])


def test_prepared_embedding_gives_what_its_tensor_gives_and_says_its_size(model):
    asked = [prompt(20, ODD_SIZE, points=1), prompt(21, ODD_SIZE, box=True, mask=True)]
    prepared = model.prepare(embedding(13))
    [kept], [anew] = (model.decode([image_job(values, ODD_SIZE, asked)]) for values in (prepared, embedding(13)))
    assert all(torch.equal(one.logits, other.logits) for one, other in zip(kept, anew, strict=True))
    assert prepared.size_bytes == 4096 * 640 * 4


def test_embedding_in_fp16_gives_what_its_values_give(model):
    half = embedding(11).half()
    asked = [prompt(0, ODD_SIZE, points=1)]
    [[stored]], [[widened]] = (model.decode([image_job(values, ODD_SIZE, asked)]) for values in (half, half.float()))
    assert torch.equal(stored.logits, widened.logits)


def test_no_jobs_and_jobs_without_prompts_give_empty_answers(model):
    assert model.decode([]) == []
    assert model.decode([image_job(embedding(0), ODD_SIZE, [])]) == [[]]


def test_labels_and_point_order_reach_the_model(model):
    points = np.array([[10, 10], [400, 300]], np.float32)
    asked = [Prompt(points, np.array(labels)) for labels in ([1, 0], [0, 1], [1, 1])]
    [answers] = model.decode([image_job(embedding(12), ODD_SIZE, asked)])
    assert all((answers[0].logits - other.logits).abs().max() > 1e-3 for other in answers[1:])


def test_prompts_that_find_their_image_by_its_address_get_the_same_logits():
    network = Network(random_sam(), torch.device("cpu"), torch.float32)
    model, runner = DecoderModel(random_sam(), "cpu"), TileRunner(network, 16)
    kinds = [kind for kind in KINDS.values() if kind.get("points", 0) <= 11 and "mask" not in kind]
    images = [model.prepare(embedding(seed)) for seed in (21, 22)]
    jobs = [
        image_job(image, ODD_SIZE, [prompt(j, ODD_SIZE, **kind) for j, kind in enumerate(kinds)]) for image in images
    ]
    expected = model.decode(jobs)
    tiles = list(pack(jobs, 16, KERNEL_WIDTHS))
    assert sorted(tile.kinds.shape[1] for tile in tiles) == list(KERNEL_WIDTHS)  # whatever the prompts
    assert sum(len(tile.owners) for tile in tiles) == 8
    for tile in tiles:
        found = runner.run(tile, [images[i] for i in tile.job_of_source])
        for row, (i, j) in enumerate(tile.owners):
            answer = expected[i][j]
            torch.testing.assert_close(found.logits[row], answer.logits, atol=2e-5, rtol=0)
            indices, ious = found.scores[row].unbind(-1)
            assert indices.tolist() == list(answer.mask_indices)
            assert ious.tolist() == pytest.approx(list(answer.predicted_iou), abs=1e-5)
