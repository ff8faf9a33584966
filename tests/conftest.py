"""Its presence puts this folder on the import path, so that tests of every kind share its helpers."""

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torchvision_shim  # noqa: F401 (ahead of the one of bench/, which has our own NMS in the place of torchvision's)
from certificates import Authority, Pair, SecretVolume, server_files
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from redis_process import RedisProcess

from splitsam.common import tracing
from splitsam.common.architectures import ARCHITECTURES
from splitsam.common.metrics import Metrics
from splitsam.encoder_service.precision import AUTO, PRECISIONS

# No test fails for being slow on a busy machine, and all runs try the same examples; `thorough` is asked for by flag.
hypothesis.settings.register_profile("splitsam", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=5000)
hypothesis.settings.load_profile("splitsam")

# A shell without job control has what it starts in the background ignore SIGINT, and children inherit that: those that
# tests interrupt would not notice.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the services of the end-to-end tests compute: cpu or cuda")
    parser.addoption("--precision", choices=(*PRECISIONS, AUTO), help="of their encoders; by default fp32")
    parser.addoption("--model", choices=tuple(ARCHITECTURES), default="vit_t", help="whose random weights they serve")
    parser.addoption("--memory-clicks", type=int, default=300, help="of test_click_memory.py")
    parser.addoption("--memory-images", type=int, default=60, help="likewise; the decoder has room for a tenth")
    parser.addoption("--memory-encodes", type=int, default=20, help="images of test_encode_memory.py")


@pytest.fixture(autouse=True)
def log_level_is_nobody_elses() -> Iterator[None]:
    """Programs that a test runs in this process set it, and what they leave hides the warnings of later tests."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """One Redis for all tests that leave it running; they keep apart by their keys."""
    server = RedisProcess(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def start_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RedisProcess]]:
    """Starts a Redis of the test's own, to be paused, killed or filled; options as of redis-server."""
    started: list[RedisProcess] = []

    def start(*options: str) -> RedisProcess:
        started.append(RedisProcess(tmp_path_factory.mktemp("redis"), options))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority("authority")


@pytest.fixture(scope="session")
def other_authority() -> Authority:
    return Authority("nobody knows this one")


@pytest.fixture(scope="session")
def server_pair(authority: Authority) -> Pair:
    return authority.issue("server")


@pytest.fixture(scope="session")
def caller_pair(authority: Authority) -> Pair:
    return authority.issue("caller")


@pytest.fixture
def volume(tmp_path: Path, server_pair: Pair, authority: Authority) -> SecretVolume:
    return SecretVolume(tmp_path / "tls", server_files(server_pair, authority))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Records this process's spans for a test; `get_finished_spans` of it are those that have ended, in that order."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_TRACER", provider.get_tracer("tests"))
    return exporter
