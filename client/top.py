"""`splitsam top`: what the replicas of a deployment are at, from their metrics."""

import collections
import http.client
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from splitsam.client.processes import LOOPBACK
from splitsam.client.scrape import Look, look, quantile
from splitsam.client.stack import StackSettings

DEFAULT_ADDRESSES = tuple(
    f"{LOOPBACK}:{port}" for port in (StackSettings.encoder_metrics_port, StackSettings.decoder_metrics_port)
)
_WINDOW_S = 30.0
_TIMEOUT_S = 2.0
_WIDE = 160
_STYLES = {"serving": "green", "loading": "yellow", "draining": "yellow", "away": "bold red"}
_FAULTS = ("INTERNAL", "UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED")
_NUMBERS = ("calls/s", "p50 ms", "p99 ms", "queue", "wait p99 ms", "batch fill")
_NOTHING = "-"


class Replica:
    """One replica, looked at again and again.

    Args:
        looks: kept, so rates are over the time between the first and the last of them.
    """

    def __init__(self, address: str, looks: int) -> None:
        self.address = address
        self.problem = ""
        self._looks: collections.deque[Look] = collections.deque(maxlen=looks)

    def refresh(self) -> None:
        """Look once more; where that fails, `problem` says how."""
        try:
            seen = look(self.address, _TIMEOUT_S)
            self.problem = "" if "splitsam_state" in seen.samples else "these are not the metrics of a splitsam service"
        except (OSError, http.client.HTTPException, ValueError) as error:
            cause = getattr(error, "reason", error)  # urllib wraps what the socket said
            self.problem = f"no answer: {getattr(cause, 'strerror', None) or cause or type(cause).__name__}"
        if self.problem:
            self._looks.clear()  # rates begin anew when it is back
        else:
            self._looks.append(seen)

    @property
    def window_s(self) -> float:
        """What the rates are over, in seconds."""
        return self._looks[-1].at_s - self._looks[0].at_s if self._looks else 0.0

    def rows(self) -> Iterator[Sequence[str | Text]]:
        """A line for the replica, and one for each method that was called."""
        if self.problem:
            yield self.address, _state("away"), self.problem
            return
        now = self._looks[-1]
        added = now.since(self._looks[0])
        busiest = max(now.by("splitsam_state", "state").items(), key=lambda pair: pair[1])[0]
        yield (
            self.address,
            _state(busiest),
            _model(now),
            "",
            "",
            "",
            f"{now.total('splitsam_queue_length'):.0f}",
            _milliseconds(_longest_wait_s(added)),
            _mean(added, "splitsam_batch_fill"),
            _hits(added),
            "",
        )
        yield "", "", _memory(now)
        for method, calls in sorted(added.by("splitsam_requests_total", "method").items()):
            if calls:
                yield self._of_method(added, method, calls)

    def _of_method(self, added: Look, method: str, calls: float) -> Sequence[str]:
        refused = added.by("splitsam_refusals_total", "reason", method=method)
        codes = added.by("splitsam_requests_total", "code", method=method)
        bad = {**refused, **{code: codes.get(code, 0.0) for code in _FAULTS}}
        per_s = 1 / max(self.window_s, 0.001)
        return (
            f"  {method}",
            "",
            "",
            f"{calls * per_s:.1f}",
            _milliseconds(quantile(added, "splitsam_request_seconds", 0.5, method=method)),
            _milliseconds(quantile(added, "splitsam_request_seconds", 0.99, method=method)),
            *("",) * 4,
            ", ".join(f"{name} {count * per_s:.1f}" for name, count in bad.items() if count),
        )


def run_top(addresses: Sequence[str], interval_s: float, *, once: bool) -> int:
    """Show the replicas until Ctrl-C, or once; once also where nobody watches a terminal.

    Args:
        addresses: of metrics, host:port or URLs.

    Returns:
        The exit status: 1 when the last look found a replica away.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDE)
        once = True
    replicas = [Replica(address, 1 + max(1, round(_WINDOW_S / interval_s))) for address in addresses]
    with ThreadPoolExecutor(min(len(replicas), 32)) as threads:

        def refresh() -> None:
            list(threads.map(Replica.refresh, replicas))

        refresh()
        if once:
            time.sleep(interval_s)
            refresh()
            console.print(table(replicas))
        else:
            _watch(replicas, console, interval_s, refresh)
    return int(any(replica.problem for replica in replicas))


def _watch(replicas: Sequence[Replica], console: Console, interval_s: float, refresh: Callable[[], None]) -> None:
    with Live(table(replicas), console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(interval_s)
                refresh()
                live.update(table(replicas), refresh=True)
        except KeyboardInterrupt:
            return


def table(replicas: Sequence[Replica]) -> Table:
    """All replicas as they were seen last."""
    window_s = max(replica.window_s for replica in replicas)
    shown = Table(title=f"rates, times and shares of the last {window_s:.0f} s", title_justify="left", box=None)
    for name in ("replica", "state", "model"):
        shown.add_column(name, overflow="fold")
    for name in _NUMBERS:
        shown.add_column(name, justify="right")
    shown.add_column("found in cache")
    shown.add_column("refused, failed /s", overflow="fold")
    for replica in replicas:
        for row in replica.rows():
            shown.add_row(*row)
    return shown


def _state(name: str) -> Text:
    return Text(name, style=_STYLES[name])


def _model(now: Look) -> str:
    models = [labels for labels, _ in now.samples.get("splitsam_model", ())]
    return ", ".join(f"{model['name']} {model['precision']} on {model['device']}" for model in models) or _NOTHING


def _memory(now: Look) -> str:
    sizes = {
        "process ": now.total("process_resident_memory_bytes"),
        "records ": now.total("splitsam_resident_bytes"),
        "uploads ": now.total("splitsam_upload_bytes"),
        "GPU ": now.total("splitsam_device_memory_bytes"),
    }
    return ", ".join(f"{name}{size / 2**20:.0f} MiB" for name, size in sizes.items() if size >= 2**20)


def _hits(added: Look) -> str:
    """The share of embeddings that were found, in memory and in Redis, and of look-ups before encoding."""
    shares = []
    for name, kind, tier in (
        ("memory", "embedding", "memory"),
        ("redis", "embedding", "redis"),
        ("encoded before", "header", "redis"),
    ):
        results = added.by("splitsam_cache_lookups_total", "result", kind=kind, tier=tier)
        if looked := sum(results.values()):
            shares.append(f"{name} {results.get('hit', 0.0) / looked:.0%}")
    return ", ".join(shares) or _NOTHING


def _mean(added: Look, name: str) -> str:
    count = added.total(f"{name}_count")
    return f"{added.total(f'{name}_sum') / count:.1f}" if count else _NOTHING


def _longest_wait_s(added: Look) -> float | None:
    """The 99th percentile in the slowest of a service's queues."""
    queues = added.by("splitsam_queue_seconds_count", "batcher")
    waits = [quantile(added, "splitsam_queue_seconds", 0.99, batcher=queue) for queue in queues]
    return max((wait for wait in waits if wait is not None), default=None)


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return _NOTHING
    return f"{seconds * 1000:.{0 if seconds >= 0.01 else 1}f}"
