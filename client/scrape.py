"""What a replica's metrics say, and how two looks at them differ."""

import dataclasses
import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping, Sequence

from prometheus_client.parser import text_string_to_metric_families

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_MOST_BYTES = 2**22


@dataclasses.dataclass(frozen=True)
class Look:
    """One scrape.

    Args:
        at_s: when, in seconds of time.monotonic().
        samples: by the name of their series, their labels and their value.
    """

    at_s: float
    samples: Mapping[str, Sequence[tuple[Mapping[str, str], float]]]

    def total(self, name: str, **labels: str) -> float:
        """The sum of a series' samples with these labels; 0 without any."""
        return sum(value for own, value in self.samples.get(name, ()) if labels.items() <= own.items())

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """The same for each value of a label."""
        found: defaultdict[str, float] = defaultdict(float)
        for own, value in self.samples.get(name, ()):
            if labels.items() <= own.items():
                found[own[label]] += value
        return dict(found)

    def since(self, earlier: "Look | None") -> "Look":
        """What has been added to counters and histograms; all of it where the process is another one than before."""
        started = "process_start_time_seconds"
        if earlier is None or earlier.total(started) != self.total(started):
            return self
        known = {(name, tuple(own.items())): value for name, all_ in earlier.samples.items() for own, value in all_}
        samples = {
            name: [(own, value - known.get((name, tuple(own.items())), 0.0)) for own, value in all_]
            for name, all_ in self.samples.items()
        }
        return Look(self.at_s, samples)


def look(address: str, timeout_s: float) -> Look:
    """Scrape a replica.

    Args:
        address: host:port of its metrics, or a URL.

    Raises:
        OSError: nobody answers there, or not in time.
        ValueError: the answer is none of Prometheus' text format.
    """
    url = address if "://" in address else f"http://{address}/metrics"
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{address}: host:port or an http:// URL of metrics is wanted")
    with _OPENER.open(url, timeout=timeout_s) as response:
        text = response.read(_MOST_BYTES).decode()
    samples: defaultdict[str, list[tuple[Mapping[str, str], float]]] = defaultdict(list)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples[sample.name].append((sample.labels, sample.value))
    return Look(time.monotonic(), dict(samples))


def quantile(seen: Look, name: str, share: float, **labels: str) -> float | None:
    """A quantile of a histogram, even within a bucket as Prometheus has it; None when nothing was observed.

    Args:
        seen: what was added, of `Look.since`.
        share: from 0 to 1.
    """
    counts = seen.by(f"{name}_bucket", "le", **labels)
    buckets = sorted((float(bound), count) for bound, count in counts.items())
    if not buckets or buckets[-1][1] <= 0:
        return None
    rank = share * buckets[-1][1]
    below, before = 0.0, 0.0
    for bound, count in buckets:
        if count >= rank and count > before:
            if bound == float("inf"):
                return below
            return below + (bound - below) * (rank - before) / (count - before)
        below, before = bound, count
    return below
