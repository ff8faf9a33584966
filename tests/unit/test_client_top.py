"""`splitsam top`: rates and quantiles of what happened between two looks, and replicas that are away."""

import math
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter, start_http_server
from rich.console import Console

from splitsam.client.scrape import Look, look, quantile
from splitsam.client.top import Replica, run_top, table
from splitsam.common.metrics import Metrics


@pytest.fixture
def served() -> Iterator[Callable[[CollectorRegistry], str]]:
    """Serves a registry; the address."""
    servers = []

    def serve(registry: CollectorRegistry) -> str:
        server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
        servers.append((server, thread))
        return f"127.0.0.1:{server.server_port}"

    yield serve
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def replica(metrics: Metrics, served: Callable[[CollectorRegistry], str]) -> Replica:
    metrics.enter("serving")
    return Replica(served(metrics.registry), looks=3)


def click(metrics: Metrics, seconds: float, code: str = "OK") -> None:
    metrics.requests.labels("PredictMasks", code).inc()
    metrics.request_seconds.labels("PredictMasks").observe(seconds)


def shown(*replicas: Replica) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table(replicas))
    return capture.get()


def test_only_what_was_added_between_two_looks_counts(metrics, replica):
    click(metrics, 20.0)
    replica.refresh()
    assert "PredictMasks" not in shown(replica)
    for _ in range(4):
        click(metrics, 0.03)
    metrics.refusals.labels("PredictMasks", "QUEUE_FULL").inc()
    click(metrics, 0.03, "RESOURCE_EXHAUSTED")
    click(metrics, 0.03, "INTERNAL")
    replica.refresh()
    [line] = [line for line in shown(replica).splitlines() if "PredictMasks" in line]
    name, per_s, p50_ms, p99_ms, *bad = line.split()
    assert name == "PredictMasks"
    assert float(per_s) == pytest.approx(6 / replica.window_s, rel=0.1, abs=0.06)
    assert 25 <= float(p50_ms) < float(p99_ms) <= 50  # of the bucket around 30 ms
    assert bad[0::2] == ["QUEUE_FULL", "INTERNAL"]


def test_a_replica_shows_its_state_model_queue_caches_and_memory(metrics, replica):
    metrics.model.labels("vit_b", "0" * 64, "bf16", "cuda").set(1)
    replica.refresh()
    metrics.queue_length.labels("decoder").set(7)
    metrics.batch_fill.labels("decoder").observe(16)
    metrics.memory_bytes.labels("embedding").set(5 * 2**20)
    for result in ("hit", "hit", "hit", "miss"):
        metrics.cache_lookups.labels("embedding", "memory", result).inc()
    metrics.cache_lookups.labels("embedding", "redis", "hit").inc()
    for result in ("hit", "miss"):
        metrics.cache_lookups.labels("header", "redis", result).inc()
    metrics.enter("draining")
    replica.refresh()
    text = shown(replica)
    found = "memory 75%, redis 100%, encoded before 50%"
    for part in ("draining", "vit_b bf16 on cuda", "16.0", found, "records 5 MiB", "process"):
        assert part in text
    assert "serving" not in text
    assert " 7 " in text


def test_the_wait_is_that_in_the_slowest_queue(metrics, replica):
    replica.refresh()
    for _ in range(99):
        metrics.queue_seconds.labels("encoder").observe(0.0001)
    metrics.queue_seconds.labels("prepare").observe(4.0)
    replica.refresh()
    [line] = [line for line in shown(replica).splitlines() if "serving" in line]
    assert any(2500 < float(word) <= 5000 for word in line.split() if word.isdecimal())  # of the bucket around 4 s


def test_a_replica_that_is_away_is_one_line_that_says_so(replica):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        away = Replica(f"127.0.0.1:{unused.getsockname()[1]}", looks=3)
        away.refresh()
    replica.refresh()
    [line] = [line.rstrip() for line in shown(replica, away).splitlines() if away.address in line]
    assert line.split(maxsplit=2)[1:] == ["away", "no answer: Connection refused"]
    assert "serving" in shown(replica, away)


def test_rates_begin_anew_when_a_replica_is_back(metrics, replica, monkeypatch):
    replica.refresh()
    address, replica.address = replica.address, "127.0.0.1:1"
    replica.refresh()
    assert replica.window_s == 0
    replica.address = address
    click(metrics, 0.03)
    replica.refresh()
    assert not replica.problem
    assert replica.window_s == 0


def test_other_peoples_metrics_are_no_replica(served):
    registry = CollectorRegistry()
    Counter("others", "Not ours", registry=registry).inc()
    replica = Replica(served(registry), looks=2)
    replica.refresh()
    assert "not the metrics of a splitsam service" in shown(replica)


@pytest.mark.parametrize("address", ["file:///etc/passwd", "127.0.0.1:port", "[::1"])
def test_an_address_that_is_none_is_a_line_too(address):
    replica = Replica(address, looks=2)
    replica.refresh()
    assert replica.problem


def test_a_server_that_speaks_no_http_is_a_line_too():
    with socket.create_server(("127.0.0.1", 0)) as server:
        replica = Replica(f"127.0.0.1:{server.getsockname()[1]}", looks=2)
        server.settimeout(10)

        def hang_up():
            connection, _ = server.accept()
            connection.recv(100)
            connection.sendall(b"220 mail\r\n")
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        replica.refresh()
        thread.join()
    assert replica.problem.startswith("no answer: ")


def test_the_counters_of_a_new_process_count_from_nothing():
    before = Look(0.0, {"process_start_time_seconds": [({}, 100.0)], "calls": [({"code": "OK"}, 50.0)]})
    after = Look(9.0, {"process_start_time_seconds": [({}, 200.0)], "calls": [({"code": "OK"}, 8.0)]})
    assert after.since(before).total("calls") == 8
    same = Look(9.0, {**after.samples, "process_start_time_seconds": [({}, 100.0)], "calls": [({"code": "OK"}, 58.0)]})
    assert same.since(before).total("calls", code="OK") == 8


def test_quantiles_lie_within_their_bucket(metrics, served):
    for _ in range(99):
        metrics.request_seconds.labels("PredictMasks").observe(0.003)
    metrics.request_seconds.labels("PredictMasks").observe(99.0)
    seen = look(served(metrics.registry), 10)
    name = "splitsam_request_seconds"
    assert quantile(seen, name, 0.5) == pytest.approx(0.0025 + 0.0025 * 50 / 99)
    assert quantile(seen, name, 1.0) == 30.0  # above the last bucket: all that is known
    assert quantile(seen, name, 0.5, method="EncodeImage") is None
    assert math.isclose(seen.total(f"{name}_sum"), 99 * 0.003 + 99)


def test_once_ends_with_a_status(metrics, served, capsys):
    address = served(metrics.registry)
    metrics.enter("loading")
    assert run_top([address], 0.2, once=True) == 0
    assert "loading" in capsys.readouterr().out
    assert run_top([address, "127.0.0.1:1"], 0.2, once=True) == 1
    assert "away" in capsys.readouterr().out
