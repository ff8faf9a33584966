"""`splitsam optimize`: files that serve the very numbers of their source, and every way they can be wrong."""

import copy
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from splitsam.client import cli
from splitsam.common.architectures import ARCHITECTURES, Architecture, build_sam
from splitsam.common.checkpoint_files import file_sha256
from splitsam.common.checkpoints import LoadedModel, compute_model_id, load_model
from splitsam.common.errors import CheckpointError
from splitsam.common.metrics import Metrics
from splitsam.common.optimised_files import Optimisation, pack_rows, restore_weights
from splitsam.common.sam_modules import Sam
from splitsam.common.settings import SettingsProblem
from splitsam.decoder_service.service import DecoderService
from splitsam.decoder_service.settings import DecoderSettings
from splitsam.encoder_service import optimize
from splitsam.encoder_service.ahead_of_time import check_precision_of_file, choose_rungs, run_optimize
from splitsam.encoder_service.optimize import build_rungs
from splitsam.encoder_service.precision import choose_precision
from splitsam.encoder_service.preprocess import PreparedImage
from splitsam.encoder_service.service import EncoderService
from splitsam.encoder_service.settings import EncoderSettings

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MADE_FOR = [("bf16", "cpu"), ("int8", "cpu"), ("int8", "cuda"), ("int8_sparse", "cuda"), ("seed", "cuda")]
LAYER = "image_encoder.blocks.0.mlp.lin1.weight"


@pytest.fixture(scope="module", autouse=True)
def two_blocks() -> Iterator[None]:
    """vit_t with one block of each kind: all that a file holds, in a quarter of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "vit_t", Architecture("vit_t", width=192, depth=2, heads=3, global_blocks=(1,)))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimised")


@pytest.fixture(scope="module")
def source(folder: Path) -> Path:
    torch.manual_seed(5)
    weights = build_sam(ARCHITECTURES["vit_t"]).state_dict()
    for name, tensor in weights.items():
        if "pos" in name:
            tensor.normal_(std=0.3)
    weights[LAYER][0] = 0
    weights[LAYER][1] *= 1e-9  # smaller than the smallest scale
    torch.save(weights, folder / "source.pth")
    save_file(weights, folder / "source.safetensors")
    return folder / "source.pth"


def optimised(source: Path, precision: str, device: str) -> Path:
    """The file, made when it is first asked for."""
    out = source.with_name(f"{precision}-{device}.safetensors")
    if not out.exists():
        optimise(source, precision, out, device)
    return out


def optimise(checkpoint: Path | str | None, precision: str, out: Path, device: str = "auto", **options) -> None:
    named = None if checkpoint is None else str(checkpoint)
    options = {"model": None, "sha256": None, "cache_dir": out.parent, **options}
    run_optimize(checkpoint=named, precision=precision, device=device, out=out, **options)


def load(checkpoint: Path, **options) -> LoadedModel:
    options = {"model": None, "sha256": None, "cache_dir": checkpoint.parent, **options}
    return load_model(checkpoint=str(checkpoint), **options)


def numbers_after(rungs: tuple[str, ...], sam: Sam) -> dict[str, Tensor]:
    """All numbers an encoder computes with; of weights in int8 these and their scales."""
    found: dict[str, Tensor] = {}
    for name, tensor in build_rungs(sam.image_encoder, rungs, CPU).state_dict().items():
        is_int8 = hasattr(tensor, "qdata")
        found |= {name: tensor.qdata, f"{name}.scale": tensor.scale} if is_int8 else {name: tensor}
    return found


@pytest.mark.parametrize(("precision", "device"), MADE_FOR)
def test_rungs_make_the_same_numbers_of_the_file_as_of_its_source(source: Path, precision: str, device: str):
    rungs = choose_rungs(precision, device)
    loaded = load(optimised(source, precision, device))
    restored = copy.deepcopy(loaded.sam.image_encoder.state_dict())
    expected, found = numbers_after(rungs, load(source).sam), numbers_after(rungs, loaded.sam)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert {name for name, tensor in found.items() if tensor.dtype == torch.int8} == (
        set() if precision == "bf16" else {name for name in restored if f"{name}.scale" in expected}
    )
    sparse = (
        {name for name in restored if (restored[name].view(-1, 4) == 0).sum(1).min() >= 2} if "cuda" in device else {}
    )
    assert ("blocks.0.mlp.lin2.weight" in sparse) == (precision in ("int8_sparse", "seed"))
    assert ("blocks.0.attn.qkv.weight" in sparse) == (precision == "seed")


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 numbers and scales of torchao for one weight."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return layer.weight.qdata, layer.weight.scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_what_was_read_gives_the_same_scales_and_numbers(dtype: torch.dtype, sign: int):
    """Whatever the largest number of a row rounds to: -128, -127 or 127, alone or beside others that round there."""
    torch.manual_seed(sign)
    weight = torch.randn(4096, 16) * torch.logspace(-12, 3, 4096)[:, None]
    weight[:, 0] = sign * weight.abs().amax(1)
    weight[::3, 1] = -weight[::3, 0]
    weight[::5, 2] = weight[::5, 0] * 0.997
    weight[::7, 3] = -weight[::7, 0] * 0.997
    weight = weight.to(dtype)
    rows, scale = rounded(weight)
    assert {-128, -127, 127} <= set(rows.unique().tolist())
    restored = restore_weights(pack_rows("w", rows, scale, weight.abs().amax(1)))["w"]
    assert torch.equal(restored.abs().amax(1)[-1:], weight.float().abs().amax(1)[-1:])
    again, scale_again = rounded(restored.to(dtype))
    assert torch.equal(scale_again, scale)
    assert torch.equal(again, rows)


def encoder_service(checkpoint: Path, *options: str) -> EncoderService:
    return EncoderService(
        EncoderSettings.load(["--device", "cpu", "--checkpoint", str(checkpoint), *options]), Metrics()
    )


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_service_gives_the_embedding_of_the_source(source: Path, precision: str):
    pixels = np.random.default_rng(0).integers(0, 256, (640, 1024, 3), dtype=np.uint8)
    image = PreparedImage(pixels, image_size=(1024, 640), input_size=(1024, 640), orientation=0)
    answers = []
    for path in (source, optimised(source, precision, "cpu")):
        model, info = encoder_service(path, "--precision", precision)._load()
        answers.append((model.encode([image])[0], info))
    (expected, info), (found, info_of_file) = answers
    assert expected.std() > 0.1
    assert torch.equal(found, expected)
    assert (info_of_file.model_id, info_of_file.precision) == (info.model_id, precision)
    assert any(f"made ready for {precision} ahead of time" in note for note in info_of_file.notes)


@pytest.mark.parametrize(("precision", "device"), MADE_FOR)
def test_every_file_of_the_same_weights_is_the_same_model_to_a_decoder(source: Path, precision: str, device: str):
    expected = load(source)
    found = load(optimised(source, precision, device))
    assert found.model_id == expected.model_id == load(source.with_suffix(".safetensors")).model_id
    assert compute_model_id(found.sam.state_dict()) != expected.model_id
    assert found.optimisation == Optimisation(
        "vit_t", expected.model_id, file_sha256(source), precision, choose_rungs(precision, device)
    )
    assert expected.optimisation is None
    for part in ("prompt_encoder", "mask_decoder"):
        weights = getattr(found.sam, part).state_dict()
        for name, tensor in getattr(expected.sam, part).state_dict().items():
            assert weights[name].dtype == torch.float32
            assert torch.equal(weights[name], tensor)


def test_decoder_service_takes_the_file(source: Path):
    path = optimised(source, "seed", "cuda")
    options = ["--device", "cpu", "--checkpoint", str(path), "--sha256", file_sha256(path)]
    _, info = DecoderService(DecoderSettings.load(options), Metrics())._load()
    assert info.model_id == load(source).model_id


def test_linear_layers_take_a_quarter_of_their_bytes(source: Path):
    with safe_open(optimised(source, "int8", "cpu"), framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert (stored[LAYER].dtype, stored[f"{LAYER}.scale"].shape) == (torch.int8, (768,))
    linear = sum(tensor.numel() for tensor in stored.values() if tensor.dtype == torch.int8)
    sizes = [path.stat().st_size for path in (source.with_suffix(".safetensors"), optimised(source, "int8", "cpu"))]
    assert sizes[0] - sizes[1] >= 2.9 * linear


def test_half_precision_source_stays_in_16_bits(source: Path, tmp_path: Path):
    torch.save({name: tensor.half() for name, tensor in load(source).sam.state_dict().items()}, tmp_path / "half.pth")
    optimise(tmp_path / "half.pth", "bf16", tmp_path / "bf16.safetensors")
    with safe_open(tmp_path / "bf16.safetensors", framework="pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert set(dtypes.values()) == {torch.float16, torch.bfloat16}
    assert dtypes[LAYER] == torch.bfloat16


def test_command_line_says_how_to_serve_the_file(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "new folder" / "small.safetensors"
    arguments = ["optimize", source, "--precision", "int8", "--device", "cpu", "--out", out, "--model", "vit_t"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert (stopped.value.code, printed.err) == (0, "")
    rows = {line[:10].strip(): line[10:] for line in printed.out.splitlines()}
    assert rows["sha256"] == file_sha256(out)
    assert rows["model id"].startswith(load(source).model_id)
    assert rows["size"].startswith(f"{source.stat().st_size / 2**20:.1f} MiB before")
    program, command, *options = shlex.split(rows["serve it"])
    assert (program, command) == ("splitsam", "up")
    settings = EncoderSettings.load(options)
    assert (settings.checkpoint, settings.sha256, settings.precision) == (str(out), file_sha256(out), "int8")
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert out.stat().st_mode == source.stat().st_mode  # others may read it, as any file


def test_same_source_gives_the_same_file(source: Path, tmp_path: Path):
    for name in ("a.safetensors", "b.safetensors", "c.safetensors"):
        optimise(source, "int8", tmp_path / name, "cpu")
        assert file_sha256(tmp_path / name) == file_sha256(optimised(source, "int8", "cpu"))


def test_shipped_weights_are_optimised_when_no_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(
        ARCHITECTURES, "vit_t", Architecture("vit_t", width=192, depth=8, heads=3, global_blocks=(3, 7))
    )
    optimise(None, "bf16", tmp_path / "t.safetensors")
    shipped = load_model(model=None, checkpoint=None, sha256=None, cache_dir=tmp_path)
    assert load(tmp_path / "t.safetensors").model_id == shipped.model_id


@pytest.mark.parametrize(
    ("precision", "device", "complaint"),
    [
        ("fp32", "auto", "--precision fp32 leaves weights as they are.* bf16, int8, int8_sparse, seed"),
        ("auto", "auto", "--precision auto is chosen by each service.* bf16, int8, int8_sparse, seed"),
        ("int4", "auto", "--precision takes one of bf16, int8, int8_sparse, seed, not 'int4'"),
        ("seed", "cpu", "--precision seed is not for a cpu: it can do bf16, int8"),
        ("int8", "tpu", "--device takes auto, cpu or cuda, not 'tpu'"),
    ],
)
def test_precision_with_nothing_to_do_ahead_of_time_is_refused(tmp_path: Path, precision, device, complaint: str):
    with pytest.raises(CheckpointError, match=complaint):
        optimise(tmp_path / "absent.pth", precision, tmp_path / "x.safetensors", device)


def test_device_is_that_of_this_machine_unless_only_gpus_do_the_precision(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_rungs("int8", "auto") == ("int8",)
    assert choose_rungs("seed", "auto") == ("bf16", "int8", "sparse")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_rungs("int8", "auto") == ("bf16", "int8")


def test_bad_input_and_output_are_one_line_and_leave_nothing_behind(source: Path, tmp_path: Path):
    done = optimised(source, "bf16", "cpu")
    itself = tmp_path / "itself.safetensors"
    itself.symlink_to(source.with_suffix(".safetensors"))
    new = tmp_path / "new.safetensors"
    refused: list[tuple[Path, Path, dict[str, str], str]] = [
        (done, new, {}, rf"already optimised, for bf16: .*SHA-256 {file_sha256(source)[:12]}"),
        (source.with_suffix(".safetensors"), itself, {}, "is the checkpoint itself: give another name"),
        (source, tmp_path / "new.pth", {}, "ends in .safetensors, not .*new.pth"),
        (tmp_path / "absent.pth", new, {}, "no checkpoint file at"),
        (source, new, {"sha256": "0" * 64}, f"expected {'0' * 64}"),
        (source, new, {"model": "vit_b"}, "holds vit_t weights, not vit_b"),
    ]
    for checkpoint, out, options, complaint in refused:
        with pytest.raises(CheckpointError, match=complaint) as caught:
            optimise(checkpoint, "int8", out, **options)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["itself.safetensors"]
    assert load(source.with_suffix(".safetensors")).optimisation is None


def test_pruning_on_images_is_kept_by_the_rungs_and_said(source: Path, tmp_path: Path):
    photo, out = tmp_path / "photo.png", tmp_path / "pruned.safetensors"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)).save(photo)
    optimise(source, "int8_sparse", out, images=[photo])
    loaded = load(out)
    assert loaded.optimisation is not None
    assert loaded.optimisation.images == 1
    assert any("pruned on 1 image." in note for note in loaded.notes)
    by_magnitude = load(optimised(source, "int8_sparse", "cuda")).sam.image_encoder.blocks[0].mlp.lin2.weight
    pruned = loaded.sam.image_encoder.blocks[0].mlp.lin2.weight
    assert not torch.equal(pruned, by_magnitude)
    assert ((pruned.view(-1, 4) == 0).sum(1) >= 2).all()
    before = numbers_after(("bf16", "int8"), load(out).sam)
    after = numbers_after(("bf16", "int8", "sparse_mlp"), load(out).sam)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("precision", "content", "complaint"),
    [
        ("int8", b"", "--image is for the precisions that prune, int8_sparse and seed, not for int8"),
        ("seed", b"no image", "--image .*photo.png: image: is not one of"),
        ("seed", None, "--image .*photo.png: No such file"),
    ],
)
def test_image_that_cannot_be_used_is_named(source: Path, tmp_path: Path, precision, content, complaint: str):
    photo = tmp_path / "photo.png"
    if content is not None:
        photo.write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint):
        optimise(source, precision, tmp_path / "x.safetensors", images=[photo])
    assert not (tmp_path / "x.safetensors").exists()


def test_output_that_cannot_be_written_is_found_out_first(source: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(OSError, match="file"):
        optimise(tmp_path / "absent.pth", "int8", tmp_path / "file" / "x.safetensors")
    with pytest.raises(CheckpointError, match="takes a file's name"):
        optimise(tmp_path / "absent.pth", "int8", tmp_path / "folder.safetensors")


@pytest.mark.parametrize("precision", ["fp32", "auto", "int8"])
def test_service_of_another_precision_refuses_the_file_and_says_what_to_do(source: Path, precision: str):
    service = encoder_service(optimised(source, "bf16", "cpu"), "--precision", precision)
    running = "fp32" if precision == "auto" else precision
    complaint = rf"^precision: .* optimised for bf16, not for {running}: add --precision bf16, or give .*SHA-256"
    with pytest.raises(SettingsProblem, match=complaint):
        service._load()


def test_service_on_another_device_refuses_the_file_and_says_what_to_do(source: Path):
    service = encoder_service(optimised(source, "int8", "cuda"), "--precision", "int8")
    complaint = "optimised for int8 on cuda, not on cpu: make one with `splitsam optimize --device cpu`"
    with pytest.raises(SettingsProblem, match=complaint):
        service._load()


@pytest.mark.parametrize(("precision", "device"), MADE_FOR)
def test_files_rungs_are_those_of_the_service(precision: str, device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(optimize, "_has_compiler", lambda: True)
    served_by = GPU if device == "cuda" else CPU
    optimisation = Optimisation("vit_t", "0" * 64, "0" * 64, precision, choose_rungs(precision, device))
    check_precision_of_file(optimisation, choose_precision(precision, served_by, "0" * 64), served_by)


@pytest.fixture
def content(source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file."""
    with safe_open(optimised(source, "int8", "cpu"), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("model_id", "beef", "damaged metadata, model_id is 'beef'"),
        ("model_id", "F" * 64, "damaged metadata, model_id is 'FFF"),
        ("model_id", None, "damaged metadata, model_id is ''"),
        ("source_sha256", "", "damaged metadata, source_sha256 is ''"),
        ("precision", "fp32", "damaged metadata, precision is 'fp32'"),
        ("rungs", "", "damaged metadata, rungs is ''"),
        ("model", "vit_b", "holds vit_t weights, not vit_b"),
        ("version", "2", "format '2', and this release reads '1': make it again"),
    ],
)
def test_tampered_metadata_are_refused_in_one_line(content, tmp_path: Path, key: str, value, complaint: str):
    tensors, metadata = content
    fields = {**json.loads(metadata["splitsam_optimised"]), key: value}
    altered = json.dumps({name: text for name, text in fields.items() if text is not None})
    save_file(tensors, tmp_path / "t.safetensors", {"splitsam_optimised": altered})
    with pytest.raises(CheckpointError, match=f"^t.safetensors: .*{complaint}") as caught:
        load(tmp_path / "t.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "[" * 100_000])
def test_metadata_of_another_kind_are_refused_in_one_line(content, tmp_path: Path, text: str):
    save_file(content[0], tmp_path / "t.safetensors", {"splitsam_optimised": text})
    with pytest.raises(CheckpointError, match=r"^t.safetensors: .*damaged metadata: make it again from its source"):
        load(tmp_path / "t.safetensors")


def test_tensors_that_do_not_fit_are_refused_in_one_line(content, tmp_path: Path):
    tensors, metadata = content
    scale, norm = f"{LAYER}.scale", "image_encoder.blocks.0.norm1.weight"
    altered: list[tuple[dict[str, Tensor | None], dict[str, str], str]] = [
        ({scale: None}, metadata, f"{LAYER} is in int8, and {scale} or .* is missing"),
        ({f"{LAYER}.largest": None}, metadata, f"{LAYER} is in int8, and .* or {LAYER}.largest is missing"),
        ({scale: torch.ones(3)}, metadata, "is not one number a row"),
        ({scale: torch.full((768,), torch.inf)}, metadata, f"{LAYER} holds numbers that are not finite"),
        ({norm: torch.ones(192, dtype=torch.int8)}, metadata, f"{norm} is in int8, and"),
        ({LAYER: tensors[LAYER].float()}, metadata, f"2 unexpected, first {LAYER}.largest"),
        ({}, {"format": "pt"}, "unexpected, first image_encoder"),
    ]
    for change, described, complaint in altered:
        kept = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(kept, tmp_path / "t.safetensors", described)
        with pytest.raises(CheckpointError, match=complaint) as caught:
            load(tmp_path / "t.safetensors")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.5, 0.999])
def test_truncated_file_is_one_clear_line(source: Path, tmp_path: Path, kept: float):
    whole = optimised(source, "int8", "cpu").read_bytes()
    (tmp_path / "t.safetensors").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(CheckpointError, match=r"^t.safetensors: not a readable .* cut short"):
        load(tmp_path / "t.safetensors")


def test_digest_of_the_file_is_checked_as_of_any_other(source: Path):
    path = optimised(source, "int8", "cpu")
    assert load(path, sha256=file_sha256(path)).name == "vit_t"
    with pytest.raises(CheckpointError, match=f"has SHA-256 {file_sha256(path)}, expected"):
        load(path, sha256=file_sha256(source))
