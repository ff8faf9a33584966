"""A few hundred requests that no client library would make, to both services; `make fuzz` sends ten thousand."""

from bench.fuzz.services import survey

REQUESTS = 300


def test_no_request_is_a_defect_and_a_click_is_answered_as_before(stack, alpha):
    seen = survey(stack, seed=1, count=REQUESTS, token=alpha.token)
    assert seen.problems == ()
    assert sum(report.requests for report in seen.reports.values()) == REQUESTS
    assert {"INVALID_ARGUMENT", "OK"} <= {code for report in seen.reports.values() for code in report.outcomes}
