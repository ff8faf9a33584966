"""What the end-to-end tests share: small images, calls as one tenant, errors as data, a look at metrics and Redis."""

import hashlib
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import redis
import torch
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from PIL import Image, ImageDraw
from prometheus_client.parser import text_string_to_metric_families
from pycocotools import mask as coco

from splitsam.client.processes import LOOPBACK, Child, free_ports, stop_all
from splitsam.client.stack import Stack, is_serving
from splitsam.common.codecs import FP16
from splitsam.common.keys import KeyRing
from splitsam.common.records import EMBEDDING, SHAPES, RecordHeader, Size, pack_record
from splitsam.v1 import decoder_pb2, decoder_pb2_grpc, encoder_pb2, encoder_pb2_grpc

FOREGROUND, BACKGROUND = decoder_pb2.POINT_LABEL_FOREGROUND, decoder_pb2.POINT_LABEL_BACKGROUND
TOKENS = {"alpha": "alpha-token-0123456789", "beta": "beta-token-9876543210"}
COMMAND = shutil.which("splitsam", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
DEADLINE_S = 60.0
START_DEADLINE_S = 600.0  # large models are compiled for minutes, on a GPU whose caches are cold
_POLL_S = 0.01
# Signs of an exception, a source file or an address in a text that a client gets to see.
_LEAK = re.compile(
    r"Traceback|Exception|Error\b|\.py\b|/tmp/|/home/|/root/|site-packages|torch|PIL|redis://|127\.0\.0\.1"
)
_CHANNEL_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)]
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def draw(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """A few seeded ellipses, (width, height) pixels."""
    rng = np.random.default_rng(seed)
    width, height = size
    image = Image.new("RGB", size, tuple(rng.integers(0, 256, 3).tolist()))
    for _ in range(4):
        x, y = (rng.random(2) * (0.8 * width, 0.8 * height)).tolist()
        a, b = (20 + rng.random(2) * (0.3 * width, 0.3 * height)).tolist()
        ImageDraw.Draw(image).ellipse((x, y, x + a, y + b), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def image_file(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of that size by its header, with hardly a pixel in it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = header, b"IDAT" + zlib.compress(b"\0\0\0\0"), b"IEND"
    written = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.logical_and(first, second).sum() / max(np.logical_or(first, second).sum(), 1))


def decode_rle(rle: decoder_pb2.RunLengthEncoding) -> np.ndarray:
    """[height, width] bool, by COCO's own decoder."""
    with warnings.catch_warnings():
        # https://github.com/ppwwyyxx/cocoapi: pycocotools 2.0.11 lacks NumPy 2's copy keyword in one __array__.
        warnings.simplefilter("ignore", DeprecationWarning)
        return coco.decode({"size": list(rle.size), "counts": rle.counts}).astype(bool)


@dataclass(frozen=True)
class Refusal:
    """What a failed call said.

    Args:
        fields: path and description of each refused field.
        retry_s: of RetryInfo, None without one.
        pushback_ms: of the `grpc-retry-pushback-ms` trailer, None without one.
    """

    code: grpc.StatusCode
    reason: str
    domain: str
    message: str
    fields: dict[str, str]
    metadata: dict[str, str]
    retry_s: float | None
    pushback_ms: int | None


def read_refusal(error: grpc.RpcError) -> Refusal:
    """The details of a call's failure; fails the test if they tell of the server's insides."""
    status = rpc_status.from_call(error)
    assert status is not None, f"no rich status: {error.code()} {error.details()}"
    info, bad, retry = (
        next((message for detail in status.details if detail.Unpack(message := kind())), None)
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
    )
    trailing = dict(error.trailing_metadata())
    assert info.metadata["request_id"] == trailing["x-request-id"]
    fields = {violation.field: violation.description for violation in bad.field_violations} if bad else {}
    assert_no_leak(error.details(), *fields.values())
    return Refusal(
        code=error.code(),
        reason=info.reason,
        domain=info.domain,
        message=error.details(),
        fields=fields,
        metadata=dict(info.metadata),
        retry_s=retry.retry_delay.ToTimedelta().total_seconds() if retry else None,
        pushback_ms=int(trailing["grpc-retry-pushback-ms"]) if "grpc-retry-pushback-ms" in trailing else None,
    )


def refusal(call: Callable[[], Any]) -> Refusal:
    """How a call is refused; fails the test if it is not."""
    try:
        answer = call()
    except grpc.RpcError as error:
        return read_refusal(error)
    raise AssertionError(f"not refused: {str(answer)[:200]}")


def assert_no_leak(*texts: str) -> None:
    for text in texts:
        assert not _LEAK.search(text), text


class Caller:
    """The stubs of both services and one tenant's credentials.

    Args:
        token: None sends no credentials.
    """

    def __init__(self, encoder: str, decoder: str, token: str | None):
        self._channels = [grpc.insecure_channel(address, _CHANNEL_OPTIONS) for address in (encoder, decoder)]
        self.encoder = encoder_pb2_grpc.EncoderServiceStub(self._channels[0])
        self.decoder = decoder_pb2_grpc.DecoderServiceStub(self._channels[1])
        self.token = token

    def close(self) -> None:
        for channel in self._channels:
            channel.close()

    def options(self, timeout_s: float = DEADLINE_S) -> dict[str, Any]:
        """Keyword arguments for every call of a stub."""
        metadata = () if self.token is None else (("authorization", f"Bearer {self.token}"),)
        return {"timeout": timeout_s, "metadata": metadata}

    def encode(self, image: bytes) -> encoder_pb2.EncodeImageResponse:
        return self.encoder.EncodeImage(encoder_pb2.EncodeImageRequest(image=image), **self.options())

    def look_up(self, image: bytes, crop: encoder_pb2.Crop | None = None) -> encoder_pb2.LookUpEmbeddingResponse:
        request = encoder_pb2.LookUpEmbeddingRequest(image_sha256=hashlib.sha256(image).digest(), crop=crop)
        return self.encoder.LookUpEmbedding(request, **self.options())

    def download(self, key: str) -> list[encoder_pb2.DownloadEmbeddingResponse]:
        request = encoder_pb2.DownloadEmbeddingRequest(embedding_key=key)
        return list(self.encoder.DownloadEmbedding(request, **self.options()))

    def predict(self, request: decoder_pb2.PredictMasksRequest) -> decoder_pb2.PredictMasksResponse:
        return self.decoder.PredictMasks(request, **self.options())

    def click(self, key: str, *prompts: decoder_pb2.Prompt, **output: Any) -> list[decoder_pb2.PromptMasks]:
        """The masks of each prompt on one image."""
        return list(self.predict(ask({key: prompts}, **output)).images[0].prompts)


def run_command(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the installed command `splitsam` to its end."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def point(x: float, y: float, label: int = FOREGROUND) -> decoder_pb2.Point:
    return decoder_pb2.Point(x=x, y=y, label=label)


def prompt(*points: decoder_pb2.Point, box: tuple[float, ...] | None = None, **mask_input: Any) -> decoder_pb2.Prompt:
    corners = None if box is None else decoder_pb2.Box(**dict(zip(("x0", "y0", "x1", "y1"), box, strict=True)))
    return decoder_pb2.Prompt(points=points, box=corners, **mask_input)


def ask(prompts_by_key: dict[str, Any], **output: Any) -> decoder_pb2.PredictMasksRequest:
    return decoder_pb2.PredictMasksRequest(
        images=[decoder_pb2.ImagePrompts(embedding_key=key, prompts=asked) for key, asked in prompts_by_key.items()],
        output=decoder_pb2.OutputOptions(**output),
    )


@dataclass(frozen=True)
class Service:
    """A service's process beside those of a stack."""

    address: str
    metrics_url: str
    child: Child


@contextmanager
def running_service(
    stack: Stack, name: str, *arguments: str, secret_file: Path | None = None, until_ready: bool = True
) -> Iterator[Service]:
    """Start another encoder or decoder on a stack's Redis, by default with its secret; stop it in the end."""
    port, metrics_port = free_ports(2)
    prefix = f"SPLITSAM_{name.upper()}_"
    command = [
        *(sys.executable, "-m", f"splitsam.{name}_service", "--port", str(port), "--metrics-port", str(metrics_port)),
        *("--secret-file", str(secret_file or stack.folder / "secret"), *arguments),
    ]
    environment = {prefix + "REDIS_URL": stack.redis_url, prefix + "LOG_FORMAT": "text"}
    child = Child(f"{name} service", command, stack.folder / f"{name}-{port}.log", environment)
    service = Service(f"{LOOPBACK}:{port}", f"http://{LOOPBACK}:{metrics_port}/metrics", child)

    def is_ready() -> bool:
        child.check_alive("starting")
        return is_serving(service.address)

    try:
        if until_ready:
            wait_until(is_ready, f"the {name} is ready", START_DEADLINE_S)
        yield service
    finally:
        stop_all([child], DEADLINE_S)


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll until the condition holds and return what it gave; fails the test after the deadline."""
    end_s = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < end_s, f"not within {deadline_s:g} s: {what}"
        time.sleep(_POLL_S)
    return found


def metric(url: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels; 0 when there is none yet."""
    with _OPENER.open(url, timeout=10) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def redis_of(stack: Stack) -> redis.Redis:
    return redis.Redis.from_url(stack.redis_url, socket_timeout=10)


def logits_in_redis(stack: Stack, token: str) -> bytes:
    """The name of a token's logits, once they have come there, behind the answer."""
    with redis_of(stack) as connection:
        wait_until(lambda: connection.keys(f"splitsam:logits:*:{token}"), "the logits are in Redis")
        [name] = connection.keys(f"splitsam:logits:*:{token}")
    return name


def write_embedding(
    stack: Stack,
    tenant: str,
    model_id: str,
    name: str,
    *,
    key: bytes | None = None,
    values: torch.Tensor | None = None,
    size: tuple[int, int] = (320, 240),
) -> str:
    """Put an embedding where the decoder looks for a tenant's, as an encoder would, without the cost of encoding.

    Args:
        name: seeds what is not given.
        values: [256, 64, 64].
        size: (width, height) pixels of the upright image.

    Returns:
        Its key.
    """
    digest = hashlib.sha256(name.encode()).digest()
    if values is None:
        seeded = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        values = torch.randn(SHAPES[EMBEDDING], generator=seeded)
    address = KeyRing([(stack.folder / "secret").read_bytes().strip()]).addresses(tenant, key or digest)[0]
    scale = 1024 / max(size)
    header = RecordHeader(
        kind=EMBEDDING,
        address=address,
        model_id=model_id,
        codec=FP16,
        shape=SHAPES[EMBEDDING],
        image_size=Size(*size),
        input_size=Size(*(int(side * scale + 0.5) for side in size)),
        orientation=0,
    )
    with redis_of(stack) as connection:
        connection.set(address.redis_name("embedding"), pack_record(header, values), ex=3600)
    return address.key.hex()
