"""Weights: every way to name them, every way they can be wrong, and the id that names them."""

import hashlib
import http.server
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from splitsam.common import checkpoint_files
from splitsam.common.architectures import ARCHITECTURES, build_sam
from splitsam.common.checkpoints import LoadedModel, compute_model_id, load_model, recognise_architecture
from splitsam.common.errors import CheckpointError

Weights = dict[str, torch.Tensor]


def load(checkpoint: Path | str | None, cache_dir: Path, model: str | None = None, sha256: str | None = None):
    named = None if checkpoint is None else str(checkpoint)
    return load_model(model=model, checkpoint=named, sha256=sha256, cache_dir=cache_dir)


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def weights() -> Weights:
    torch.manual_seed(7)
    return build_sam(ARCHITECTURES["vit_t"]).state_dict()


@pytest.fixture(scope="module")
def files(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One set of weights in each file format."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(weights, folder / "zip.pth")
    torch.save(weights, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(weights, folder / "whole.safetensors")
    torch.save({name: tensor.half() for name, tensor in weights.items()}, folder / "half.pth")
    return folder


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "whole.safetensors"])
def test_every_file_format_gives_the_same_model(files: Path, weights: Weights, tmp_path: Path, name: str):
    loaded = load(files / name, tmp_path)
    assert (loaded.name, loaded.demonstration, loaded.notes) == ("vit_t", True, ())
    assert loaded.model_id == compute_model_id(weights)
    assert not loaded.sam.training
    for key, tensor in loaded.sam.state_dict().items():
        assert torch.equal(tensor, weights[key])
        assert tensor.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in loaded.sam.parameters())


def test_file_url_and_home_are_paths_too(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spaced = tmp_path / "with space.safetensors"
    spaced.symlink_to(files / "whole.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(spaced.as_uri(), tmp_path).model_id == load("~/with space.safetensors", tmp_path).model_id


def test_half_precision_weights_are_the_model_of_their_float32_values(files: Path, weights: Weights, tmp_path: Path):
    loaded = load(files / "half.pth", tmp_path)
    assert loaded.model_id == compute_model_id({name: tensor.half().float() for name, tensor in weights.items()})
    assert loaded.notes == ("The checkpoint's float16 weights were converted to float32.",)
    assert next(loaded.sam.parameters()).dtype == torch.float32


def test_model_id_follows_the_documented_bytes():
    tensor = torch.tensor([[1.0, 2.0]])
    number = b"\0\0\x80\x3f\0\0\0\x40"
    lengths = b"".join(n.to_bytes(8, "little") for n in (1, 2, 1, 2, 8))
    assert compute_model_id({"w": tensor}) == hashlib.sha256(lengths + b"w" + number).hexdigest()


def test_model_id_ignores_order_and_strides_and_sees_names_shapes_and_values():
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(())
    one = compute_model_id({"a": a, "b": b})
    assert compute_model_id({"b": b, "a": a.t().contiguous().t()}) == one
    others = [{"a": a.reshape(3, 2), "b": b}, {"a": b, "b": a}, {"aa": a, "b": b}, {"a": a + 1e-6, "b": b}, {"a": a}]
    assert len({one, *map(compute_model_id, others)}) == 1 + len(others)


def skeleton(name: str) -> Weights:
    """The weights that tell an architecture, without their memory."""
    spec = ARCHITECTURES[name]
    shapes = {
        f"image_encoder.blocks.{i}.attn.rel_pos_h": (127 if i in spec.global_blocks else 27, spec.width // spec.heads)
        for i in range(spec.depth)
    }
    shapes["image_encoder.patch_embed.proj.weight"] = (spec.width, 3, 16, 16)
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_is_recognised_from_shapes(name: str):
    assert recognise_architecture(skeleton(name)) == ARCHITECTURES[name]


def test_other_global_blocks_are_another_architecture():
    weights = skeleton("vit_b")
    weights["image_encoder.blocks.2.attn.rel_pos_h"] = torch.empty(27, 64, device="meta")
    with pytest.raises(CheckpointError, match=r"768 wide and 12 deep .* \[5, 8, 11\] is none of vit_t"):
        recognise_architecture(weights)


def test_wrong_model_name_is_refused(tmp_path: Path):
    small = {key: torch.zeros(tensor.shape) for key, tensor in skeleton("vit_b").items()}
    save_file(small, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="the checkpoint holds vit_b weights, not vit_h"):
        load(tmp_path / "b.safetensors", tmp_path, model="vit_h")


@pytest.mark.parametrize("model", ["vit_b", "vit_l", "vit_h"])
def test_model_without_weights_says_the_command_to_run(model: str, tmp_path: Path):
    with pytest.raises(CheckpointError) as caught:
        load(None, tmp_path, model=model)
    message = str(caught.value)
    assert f"splitsam serve-encoder --checkpoint https://dl.fbaipublicfiles.com/segment_anything/sam_{model}" in message
    assert "SPLITSAM_ENCODER_CHECKPOINT" in message
    assert "SPLITSAM_DECODER_CHECKPOINT" in message


@pytest.mark.parametrize("model", [None, "vit_t"])
def test_nothing_given_is_the_shipped_model_or_says_that_it_is_missing(model: str | None, tmp_path: Path):
    try:
        loaded = load(None, tmp_path, model=model)
    except CheckpointError as error:
        assert "missing from this installation" in str(error)  # noqa: PT017 (both outcomes are right)
    else:
        assert (loaded.name, loaded.demonstration) == ("vit_t", True)


@pytest.mark.parametrize(
    ("checkpoint", "model", "sha256", "complaint"),
    [
        (None, "vit_x", None, "no model is called 'vit_x'"),
        (None, None, "0" * 64, "--sha256 is the digest of --checkpoint"),
        ("absent.pth", None, None, "no checkpoint file at absent.pth"),
        ("absent.pth", None, "beef", "64 hex digits"),
        ("http://127.0.0.1/sam_vit_b_01ec64.pth", None, None, "not http://127.0.0.1/sam_vit_b_01ec64.pth"),
        ("ftp://127.0.0.1/a.pth", None, "0" * 64, "not ftp://127.0.0.1/a.pth"),
        ("file://elsewhere/a.pth", None, None, "not file://elsewhere/a.pth"),
        ("https://127.0.0.1/a.pth?token=secret", None, None, "add --sha256 for https://127.0.0.1/a.pth$"),
        ("https://me:secret@127.0.0.1/a.pth", None, None, "not https://127.0.0.1/a.pth$"),
        ("absent\n.pth", None, None, r"no checkpoint file at absent\\n\.pth"),
        ("a" * 300, None, None, "cannot read the checkpoint file: .* too long"),
        ("~nobody-has-this-name/a.pth", None, None, "no checkpoint file at ~nobody-has-this-name/a.pth"),
        ("file://[", None, None, "--checkpoint is not a URL"),
        ("https://127.0.0.1:http/a.pth", None, "0" * 64, "--checkpoint is not a URL"),
        ("https://127.0.0.1/a.exe", None, "0" * 64, "ends in .pth, .pt, .safetensors; 'a.exe' does not"),
    ],
)
def test_bad_settings_are_refused_in_one_line(checkpoint, model, sha256, complaint, tmp_path: Path):
    with pytest.raises(CheckpointError, match=complaint) as caught:
        load(checkpoint, tmp_path, model, sha256)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_digest_is_checked_before_a_file_is_read(files: Path, tmp_path: Path):
    path = files / "whole.safetensors"
    assert load(path, tmp_path, sha256=digest_of(path).upper()).name == "vit_t"
    with pytest.raises(CheckpointError, match=f"has SHA-256 {digest_of(path)}, expected {'0' * 64}"):
        load(path, tmp_path, sha256="0" * 64)


def test_meta_file_name_promises_metas_digest(files: Path, tmp_path: Path):
    path = tmp_path / "sam_vit_b_01ec64.pth"
    shutil.copy(files / "zip.pth", path)
    with pytest.raises(CheckpointError, match=r"expected ec2df627.*fetch it again"):
        load(path, tmp_path)
    assert load(path, tmp_path, sha256=digest_of(path)).name == "vit_t"


class Opened:
    """Unpickling this would leave a trace."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_pickled_objects_are_never_run(weights: Weights, tmp_path: Path):
    torch.save({**weights, "x": Opened(tmp_path / "trace")}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        load(tmp_path / "evil.pth", tmp_path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "whole.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.5, 0.999])
def test_truncated_file_is_one_clear_line(files: Path, tmp_path: Path, name: str, kept: float):
    content = (files / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=f"^{name}: not a readable .* cut short") as caught:
        load(tmp_path / name, tmp_path)
    assert "\n" not in str(caught.value)


def test_foreign_and_altered_weights_are_refused(weights: Weights, tmp_path: Path):
    key = "mask_decoder.iou_token.weight"
    without = {name: tensor for name, tensor in weights.items() if name != key}
    altered: dict[str, tuple[object, str]] = {
        "nested": ({"model": weights}, "not a plain state dict"),
        "list": ([1, 2], "not a plain state dict"),
        "foreign": ({"conv1.weight": torch.ones(2)}, "no weights of segment_anything's SAM"),
        "missing": (without, f"1 missing, first {key}"),
        "extra": ({**weights, "hq.w": torch.ones(1)}, "1 unexpected, first hq.w"),
        "renamed": ({**without, "b": weights[key]}, f"1 missing, first {key}; 1 unexpected, first b"),
        "shape": ({**weights, key: torch.ones(2, 256)}, rf"{key} is \[2, 256\], not \[1, 256\]"),
        "dtype": ({**weights, key: torch.ones(1, 256, dtype=torch.int8)}, f"{key} holds torch.int8"),
        "nan": ({**weights, key: torch.full((1, 256), torch.nan)}, f"{key} holds numbers that are not finite"),
    }
    path = tmp_path / "altered.pth"
    for content, complaint in altered.values():
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=complaint) as caught:
            load(path, tmp_path)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the https tests make their certificate with the openssl command")
    command = f"{openssl} req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    pair = folder / "cert.pem", folder / "key.pem"
    subprocess.run([*command.split(), "-out", pair[0], "-keyout", pair[1]], check=True, capture_output=True)
    return pair


class HttpsServer(http.server.ThreadingHTTPServer):
    """Serves a folder on the loopback; counts requests, and spoils what the path asks it to."""

    requests: list[str]
    folder: Path


class Handler(http.server.BaseHTTPRequestHandler):
    server: HttpsServer

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        kind, _, name = self.path.partition("?")[0].removeprefix("/").partition("/")
        if kind in ("http", "again"):
            self.send_response(302)
            scheme = "http" if kind == "http" else "https"
            self.send_header("Location", f"{scheme}://127.0.0.1:{self.server.server_port}/whole/{name}")
            self.end_headers()
            return
        path = self.server.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if kind == "short" else content)

    def log_message(self, *arguments: object) -> None:
        """Keep the test's output quiet."""


@pytest.fixture
def https(files: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpsServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = HttpsServer(("127.0.0.1", 0), Handler)
    server.requests, server.folder = [], files
    server.socket = context.wrap_socket(server.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(server: HttpsServer, path: str, cache_dir: Path, sha256: str | None = None) -> LoadedModel:
    return load(f"https://127.0.0.1:{server.server_port}/{path}?token=secret", cache_dir, sha256=sha256)


def test_url_is_downloaded_once_and_cached_by_digest(https: HttpsServer, files: Path, tmp_path: Path):
    digest = digest_of(files / "whole.safetensors")
    first = fetch(https, "again/whole.safetensors", tmp_path, digest)
    assert https.requests == ["/again/whole.safetensors?token=secret", "/whole/whole.safetensors"]
    second = fetch(https, "whole/whole.safetensors", tmp_path, digest)
    assert len(https.requests) == 2
    assert first.model_id == second.model_id
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"{digest}.safetensors"]


def test_damaged_cache_entry_is_downloaded_again(https: HttpsServer, files: Path, tmp_path: Path):
    digest = digest_of(files / "zip.pth")
    cached = tmp_path / "checkpoints" / f"{digest}.pth"
    cached.parent.mkdir()
    cached.write_bytes(b"half a file")
    fetch(https, "whole/zip.pth", tmp_path, digest)
    assert digest_of(cached) == digest


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("whole/zip.pth", f"has SHA-256 [0-9a-f]{{64}}, expected {'0' * 64}"),
        ("short/zip.pth", r"broke off after \d+ of \d+ bytes"),
        ("whole/absent.pth", "answered 404"),
        ("http/zip.pth", "cannot download .*unknown url type: http"),
    ],
)
def test_failed_download_leaves_nothing_behind(https: HttpsServer, tmp_path: Path, path: str, complaint: str):
    with pytest.raises(CheckpointError, match=complaint) as caught:
        fetch(https, path, tmp_path, "0" * 64)
    assert "secret" not in str(caught.value)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_download_is_bounded_in_size(https: HttpsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint_files, "MAX_DOWNLOAD_BYTES", 2**20)
    with pytest.raises(CheckpointError, match="larger than 1048576 bytes"):
        fetch(https, "whole/zip.pth", tmp_path, "0" * 64)


def test_unknown_certificate_and_unreachable_server_are_refused(
    https: HttpsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(CheckpointError, match=r"cannot download .*CERTIFICATE_VERIFY_FAILED"):
        fetch(https, "whole/zip.pth", tmp_path, "0" * 64)
    with pytest.raises(CheckpointError, match=r"cannot download .*refused"):
        load("https://127.0.0.1:1/a.pth", tmp_path, sha256="0" * 64)


def test_cache_folder_that_cannot_be_written_is_named(https: HttpsServer, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot keep a checkpoint in .*file/checkpoints"):
        fetch(https, "whole/zip.pth", tmp_path / "file", "0" * 64)
