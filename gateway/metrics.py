"""The Prometheus metrics of the gateway; names and meanings are part of its interface."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class GatewayMetrics:
    """One registry per process, handed to whoever measures."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "splitsam_gateway_requests",
            "Finished requests by route and HTTP status; a pointer's is that of its end",
            ["route", "status"],
            registry=self.registry,
        )
        self.in_progress = Gauge(
            "splitsam_gateway_requests_in_progress",
            "Requests and pointers that have begun and not ended",
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "splitsam_gateway_request_seconds",
            "Time in the gateway, the services' included, in seconds",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.positions = Counter(
            "splitsam_gateway_positions",
            "Positions of pointers by what became of them: answered, superseded or failed",
            ["result"],
            registry=self.registry,
        )

        self.fetches = Counter(
            "splitsam_gateway_fetches",
            "Images fetched by result: OK, or the reason that the caller was told",
            ["result"],
            registry=self.registry,
        )
        self.encoded_ahead = Counter(
            "splitsam_gateway_encoded_ahead",
            "Images of Label Studio's projects by result: encoded, known from an earlier run, or failed",
            ["result"],
            registry=self.registry,
        )
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
