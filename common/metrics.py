"""The Prometheus metrics of the services, and what those of every process that serves have; names and meanings are
part of their interface."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
STATES = ("loading", "serving", "draining")
_FILL = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class ProcessMetrics:
    """One registry per process, handed to whoever measures."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.certificate_reloads = Counter(
            "splitsam_certificate_reloads",
            "Changed certificates by what became of them: taken, or refused",
            ["result"],
            registry=self.registry,
        )
        self.certificate_expiry = Gauge(
            "splitsam_certificate_expiry_seconds",
            "Until when the certificate in use is valid, in Unix time; 0 without TLS",
            registry=self.registry,
        )

    def serve(self, host: str, port: int) -> None:
        """Answer scrapes on http://host:port/metrics from a thread of its own."""
        start_http_server(port, addr=host, registry=self.registry)

    def seconds(self, name: str, meaning: str, labels: list[str]) -> Histogram:
        return Histogram(name, f"{meaning}, in seconds", labels, buckets=_SECONDS, registry=self.registry)


class Metrics(ProcessMetrics):
    """Those of a service."""

    def __init__(self) -> None:
        super().__init__()
        self._state = Gauge(
            "splitsam_state",
            "1 for what the process is at: loading, serving or draining",
            ["state"],
            registry=self.registry,
        )
        self.model = Gauge(
            "splitsam_model",
            "1 for the model that is served, its precision and its device",
            ["name", "model_id", "precision", "device"],
            registry=self.registry,
        )
        self.requests = Counter(
            "splitsam_requests", "Finished RPCs by method and gRPC code", ["method", "code"], registry=self.registry
        )
        self.in_progress = Gauge(
            "splitsam_requests_in_progress", "RPCs that have begun and not ended", registry=self.registry
        )
        self.loop_lag_seconds = Gauge(
            "splitsam_event_loop_lag_seconds", "How late the event loop is, smoothed", registry=self.registry
        )
        self.refusals = Counter(
            "splitsam_refusals",
            "RPCs refused for want of room, time or quota, by method and reason",
            ["method", "reason"],
            registry=self.registry,
        )
        self.request_seconds = self.seconds("splitsam_request_seconds", "RPC time in the server", ["method"])
        self.queue_seconds = self.seconds("splitsam_queue_seconds", "Wait for a place in a batch", ["batcher"])
        self.model_seconds = self.seconds("splitsam_model_seconds", "Model time of a batch", ["batcher"])
        self.batch_fill = Histogram(
            "splitsam_batch_fill",
            "Work units in a batch: images of the encoder, prompts of the decoder",
            ["batcher"],
            buckets=_FILL,
            registry=self.registry,
        )
        self.queue_length = Gauge(
            "splitsam_queue_length", "Entries waiting for a batch", ["batcher"], registry=self.registry
        )
        self.dropped = Counter(
            "splitsam_dropped",
            "Entries that left a queue unserved: cancelled or expired",
            ["batcher", "why"],
            registry=self.registry,
        )
        self.cache_lookups = Counter(
            "splitsam_cache_lookups",
            "Lookups by record kind, tier (memory, redis) and result (hit, miss, bad, unavailable)",
            ["kind", "tier", "result"],
            registry=self.registry,
        )
        self.cache_unstored = Counter(
            "splitsam_cache_unstored",
            "Records that Redis did not get, by kind and why: unavailable, or backlog, too many waited for it already",
            ["kind", "why"],
            registry=self.registry,
        )
        self.prefetches = Counter(
            "splitsam_prefetches",
            "Embeddings asked for ahead of their first prompt, by result: fetched, resident already, or failed",
            ["result"],
            registry=self.registry,
        )
        self.evictions = Counter(
            "splitsam_evictions",
            "Records that left memory to make room for others, by kind",
            ["kind"],
            registry=self.registry,
        )
        self.cache_seconds = self.seconds("splitsam_cache_seconds", "Redis round trips", ["operation"])
        self.device_errors = Counter(
            "splitsam_device_errors",
            "Failures of the device: out_of_memory, survived, and lost, which ends the process",
            ["kind"],
            registry=self.registry,
        )
        self.decode_seconds = self.seconds("splitsam_image_decode_seconds", "Decoding and resizing an image", [])
        self.format_seconds = self.seconds("splitsam_mask_format_seconds", "Masks to the formats asked for", [])
        self.memory_bytes = Gauge(
            "splitsam_resident_bytes", "Bytes of records kept in memory", ["kind"], registry=self.registry
        )
        self.device_memory_bytes = Gauge(
            "splitsam_device_memory_bytes",
            "Bytes that torch holds of a GPU's memory; 0 on a CPU",
            registry=self.registry,
        )
        self.upload_bytes = Gauge(
            "splitsam_upload_bytes", "Bytes of requests being read or in work", registry=self.registry
        )

    def enter(self, state: str) -> None:
        """Say what the process is at, one of STATES."""
        for each in STATES:
            self._state.labels(each).set(each == state)
