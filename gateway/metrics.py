"""The Prometheus metrics of the gateway; names and meanings are part of its interface."""

from prometheus_client import Counter, Gauge

from splitsam.common.metrics import ProcessMetrics


class GatewayMetrics(ProcessMetrics):
    """Those of the gateway, beside what every process has."""

    def __init__(self) -> None:
        super().__init__()
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
        self.request_seconds = self.seconds(
            "splitsam_gateway_request_seconds", "Time in the gateway, the services' included", ["route"]
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
