"""The Prometheus metrics of the services, and what those of every process that serves have; names and meanings are
part of their interface."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
STATES = ("loading", "serving", "draining")
_FILL = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class ProcessMetrics:
    """One registry per process, handed to whoever measures."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.certificate_reloads = self.counter(
            "splitsam_certificate_reloads", "Changed certificates by what became of them: taken, or refused", ["result"]
        )
        self.certificate_expiry = self.gauge(
            "splitsam_certificate_expiry_seconds",
            "Until when the certificate in use is valid, in Unix time; 0 without TLS",
        )

        self.token_reloads = self.counter(
            "splitsam_token_reloads", "Changed files of tokens by what became of them: taken, or refused", ["result"]
        )

    def serve(self, host: str, port: int) -> None:
        """Answer scrapes on http://host:port/metrics from a thread of its own."""
        start_http_server(port, addr=host, registry=self.registry)

    def counter(self, name: str, meaning: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, meaning, labels, registry=self.registry)

    def gauge(self, name: str, meaning: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(name, meaning, labels, registry=self.registry)

    def seconds(self, name: str, meaning: str, labels: Sequence[str] = ()) -> Histogram:
        return Histogram(name, f"{meaning}, in seconds", labels, buckets=_SECONDS, registry=self.registry)


class Metrics(ProcessMetrics):
    """Those of a service."""

    def __init__(self) -> None:
        super().__init__()
        self._state = self.gauge(
            "splitsam_state", "1 for what the process is at: loading, serving or draining", ["state"]
        )
        self.model = self.gauge(
            "splitsam_model",
            "1 for the model that is served, its precision and its device",
            ["name", "model_id", "precision", "device"],
        )
        self.loop_lag_seconds = self.gauge("splitsam_event_loop_lag_seconds", "How late the event loop is, smoothed")
        self._add_calls()
        self._add_batches()
        self._add_records()
        self._add_work()

    def enter(self, state: str) -> None:
        """Say what the process is at, one of STATES."""
        for each in STATES:
            self._state.labels(each).set(each == state)

    def _add_calls(self) -> None:
        self.requests = self.counter("splitsam_requests", "Finished RPCs by method and gRPC code", ["method", "code"])
        self.in_progress = self.gauge("splitsam_requests_in_progress", "RPCs that have begun and not ended")
        self.request_seconds = self.seconds("splitsam_request_seconds", "RPC time in the server", ["method"])
        self.refusals = self.counter(
            "splitsam_refusals",
            "RPCs answered RESOURCE_EXHAUSTED: for want of room, time, quota or device memory, by method and reason",
            ["method", "reason"],
        )
        self.upload_bytes = self.gauge("splitsam_upload_bytes", "Bytes of requests being read or in work")

    def _add_batches(self) -> None:
        self.queue_length = self.gauge(
            "splitsam_queue_length", "Entries waiting for a batch, or to be decoded", ["batcher"]
        )
        self.queue_seconds = self.seconds(
            "splitsam_queue_seconds", "Wait for a place in a batch, or to be decoded", ["batcher"]
        )
        self.dropped = self.counter(
            "splitsam_dropped", "Entries that left a queue unserved: cancelled, expired or shed", ["batcher", "why"]
        )
        self.batch_fill = Histogram(
            "splitsam_batch_fill",
            "Work units in a batch: images of the encoder, prompts of the decoder",
            ["batcher"],
            buckets=_FILL,
            registry=self.registry,
        )
        self.model_seconds = self.seconds("splitsam_model_seconds", "Model time of a batch", ["batcher"])

    def _add_records(self) -> None:
        self.cache_lookups = self.counter(
            "splitsam_cache_lookups",
            "Lookups by kind (embedding, logits, header), tier (memory, redis), result (hit, miss, bad, unavailable)",
            ["kind", "tier", "result"],
        )
        self.cache_unstored = self.counter(
            "splitsam_cache_unstored",
            "Records that Redis did not get, by kind and why: unavailable, or backlog, too many waited for it already",
            ["kind", "why"],
        )
        self.redis_memory_bytes = self.gauge("splitsam_redis_memory_bytes", "Bytes of memory that Redis uses")
        self.redis_memory_limit_bytes = self.gauge(
            "splitsam_redis_memory_limit_bytes", "Bytes of memory from which on Redis evicts; 0 without a limit"
        )
        self.redis_evicted = self.gauge(
            "splitsam_redis_evicted_records", "Records that left Redis to make room for others since it started"
        )
        self.cache_seconds = self.seconds("splitsam_cache_seconds", "Redis round trips", ["operation"])
        self.prefetches = self.counter(
            "splitsam_prefetches",
            "Embeddings asked for ahead of their first prompt, by result: fetched, resident already, or failed",
            ["result"],
        )
        self.evictions = self.counter(
            "splitsam_evictions", "Records that left memory to make room for others, by kind", ["kind"]
        )
        self.memory_bytes = self.gauge("splitsam_resident_bytes", "Bytes of records kept in memory", ["kind"])

    def _add_work(self) -> None:
        self.decode_seconds = self.seconds("splitsam_image_decode_seconds", "Decoding and resizing an image")
        self.format_seconds = self.seconds("splitsam_mask_format_seconds", "Masks to the formats asked for")
        self.device_errors = self.counter(
            "splitsam_device_errors",
            "Failures of the device: out_of_memory, survived, and lost, which ends the process",
            ["kind"],
        )
        self.device_memory_bytes = self.gauge(
            "splitsam_device_memory_bytes", "Bytes that torch holds of a GPU's memory; 0 on a CPU"
        )
