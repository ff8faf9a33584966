"""The Prometheus metrics of the gateway; names and meanings are part of its interface."""

from splitsam.common.metrics import ProcessMetrics


class GatewayMetrics(ProcessMetrics):
    """Those of the gateway, beside what every process has."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = self.counter(
            "splitsam_gateway_requests",
            "Finished requests by route and HTTP status; a pointer's is that of its end",
            ["route", "status"],
        )
        self.refusals = self.counter(
            "splitsam_gateway_refusals", "Requests and pointers refused since their caller used up its share", ["route"]
        )
        self.in_progress = self.gauge(
            "splitsam_gateway_requests_in_progress", "Requests and pointers that have begun and not ended"
        )
        self.request_seconds = self.seconds(
            "splitsam_gateway_request_seconds", "Time in the gateway, the services' included", ["route"]
        )
        self.positions = self.counter(
            "splitsam_gateway_positions",
            "Positions of pointers by what became of them: answered, superseded or failed",
            ["result"],
        )
        self.fetches = self.counter(
            "splitsam_gateway_fetches",
            "Images fetched by result: OK, or the reason that the caller was told",
            ["result"],
        )
        self.encoded_ahead = self.counter(
            "splitsam_gateway_encoded_ahead",
            "Images of Label Studio's projects by result: encoded, known from an earlier run, or failed",
            ["result"],
        )
