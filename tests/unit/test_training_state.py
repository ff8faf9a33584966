"""A training state survives its files, and a run goes on from them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from splitsam.common.architectures import ARCHITECTURES, build_sam
from training import state as state_files
from training.batched import decode, embed_masks, embed_points, encode
from training.peers import Peers
from training.pool import Families, Materials, draw_procedural
from training.state import load_progress, load_shards, save_progress, save_shards
from training.train import Recipe, Trainer, learning_rate

TINY = Recipe(
    coarse_side=256, coarse_batch=1, fine_side=256, fine_batch=1, objects=2, rounds=2, report_steps=1, batches_a_draw=1
)


@pytest.fixture(scope="module")
def materials() -> Materials:
    return draw_procedural(Families(("blob",), ("clouds",), each=2), np.random.default_rng(0), torch.device("cpu"))


def test_save_shards_splits_and_restores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(state_files, "SHARD_BYTES", 1000)
    tensors = {f"layer{i}": torch.randn(10, 10) for i in range(5)}
    paths = save_shards(tensors, tmp_path, "weights", {"moment": "1"})
    assert len(paths) == 3
    loaded, metadata = load_shards(tmp_path, "weights")
    assert metadata["moment"] == "1"
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


def test_load_shards_refuses_shards_of_two_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(state_files, "SHARD_BYTES", 1000)
    tensors = {f"layer{i}": torch.randn(10, 10) for i in range(5)}
    save_shards(tensors, tmp_path, "weights", {"moment": "1"})
    stale = (tmp_path / "weights.1.safetensors").read_bytes()
    save_shards(tensors, tmp_path, "weights", {"moment": "2"})
    (tmp_path / "weights.1.safetensors").write_bytes(stale)
    with pytest.raises(ValueError, match="another moment"):
        load_shards(tmp_path, "weights")


def test_load_progress_goes_on_from_the_average_alone(tmp_path: Path):
    save_progress(tmp_path, {"a": torch.ones(2)}, {"a": torch.full((2,), 0.5)}, {"seconds": 3.0})
    assert load_progress(tmp_path)[0]["a"].tolist() == [1, 1]
    (tmp_path / "weights.0.safetensors").unlink()
    weights, average, progress = load_progress(tmp_path)
    assert weights["a"].tolist() == average["a"].tolist() == [0.5, 0.5]
    assert progress == {"seconds": 3.0}


def test_trainer_resumes_where_it_stopped(tmp_path: Path, materials: Materials):
    def make() -> Trainer:
        return Trainer(
            TINY, materials, tmp_path, torch.device("cpu"), compiled=False, planned_seconds=100, peers=Peers("cpu")
        )

    first = make()
    row = first.train_step(0)
    assert torch.isfinite(row).all()
    first.save()
    second = make()
    assert second.progress["steps"] == 1
    assert second.progress["runs"] == 2
    for key, value in first.sam.state_dict().items():
        assert torch.equal(second.sam.state_dict()[key], value)


def test_learning_rate_warms_up_and_lands():
    recipe = Recipe(learning_rate=1.0, warm_up_steps=10)
    assert learning_rate(recipe, 0.0, 0) == pytest.approx(0.1)
    assert learning_rate(recipe, 0.0, 100) == pytest.approx(1.0)
    assert learning_rate(recipe, 1.0, 100) == pytest.approx(0.02)


@torch.no_grad()
def test_batched_forward_agrees_with_segment_anything():
    torch.manual_seed(0)
    sam = build_sam(ARCHITECTURES["vit_t"]).eval()
    for name, parameter in sam.named_parameters():
        if "pos" in name:
            parameter.normal_(0, 0.3)
    image = torch.randn(1, 3, 1024, 1024)
    embedding = sam.image_encoder(image)
    torch.testing.assert_close(encode(sam, image), embedding, atol=1e-4, rtol=1e-4)

    points, labels = torch.rand(2, 1, 2) * 1000, torch.ones(2, 1)
    sparse, dense = sam.prompt_encoder((points, labels), None, None)
    position = sam.prompt_encoder.get_dense_pe()
    expected, expected_iou = sam.mask_decoder.predict_masks(embedding, position, sparse, dense)
    padded = torch.cat([points, torch.zeros(2, 1, 2)], 1)
    own = embed_points(sam.prompt_encoder, padded, torch.tensor([[1, -1]] * 2))
    torch.testing.assert_close(own, sparse)
    none = embed_masks(sam.prompt_encoder, torch.zeros(2, 1, 256, 256), torch.zeros(2, dtype=torch.bool))
    longer = torch.nn.functional.pad(own, (0, 0, 0, 2))
    present = torch.tensor([True, True, False, False])
    logits, iou = decode(sam.mask_decoder, embedding, position, longer, none, present)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(iou, expected_iou, atol=1e-4, rtol=1e-4)
