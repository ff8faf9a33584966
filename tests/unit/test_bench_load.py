"""The load generator: schedules that depend on nothing but their seed, and figures that hide nothing."""

import pytest

from bench.figures import percentile
from bench.load.annotators import Habits, annotators_for, plan_crowd
from bench.load.crowd import OK, Outcome
from bench.load.rows import Environment, Phase, Row, normal_after_s, summarise
from bench.load.streams import SUPERSEDED
from bench.load.tables import build_tables, collect_files
from bench.load.watch import Watched
from bench.row_file import read_rows, results_path, write_rows

HABITS = Habits(clicks_per_s=0.5, clicks_per_image=8)
ENVIRONMENT = Environment("cpu-2-cores", "vit_t", 0.1, "2.13", "1.85", "abc1234", "python -m bench.load --overload 10")


def outcomes(*latencies: float, reason: str = OK, retry_s: float | None = None) -> list[Outcome]:
    return [
        Outcome("click", float(at_s), ms, reason, retry_s, {"queue": ms / 2, "model": 1}, sent_late_ms=ms / 10)
        for at_s, ms in enumerate(latencies)
    ]


def row(name: str, seen: list[Outcome], unloaded_ms: float | None = None) -> Row:
    phase = Phase("overload", name, 10.0, 3)
    return summarise(phase, "click", seen, Watched(1.5, 20.0, 300.0), 500, ENVIRONMENT, 1.5, unloaded_ms)


def test_a_schedule_is_its_seeds_and_in_order():
    events = plan_crowd(20, HABITS, 60.0, "one")
    assert events == plan_crowd(20, HABITS, 60.0, "one") != plan_crowd(20, HABITS, 60.0, "two")
    assert [event.at_s for event in events] == sorted(event.at_s for event in events)
    assert all(0 <= event.at_s < 60 for event in events)


def test_a_crowd_offers_what_it_is_asked_for():
    events = plan_crowd(annotators_for(50.0, HABITS), HABITS, 200.0, "")
    assert len(events) / 200 == pytest.approx(50, rel=0.05)
    encodes = [event for event in events if event.kind == "encode"]
    assert len(events) / len(encodes) == pytest.approx(9, rel=0.1)


def test_an_annotator_clicks_refines_and_goes_on_to_the_next_image():
    events = [event for event in plan_crowd(1, HABITS, 200.0, "") if event.image > 0]
    first = [event for event in events if event.image == 1]
    assert [event.kind for event in first] == ["encode"] + ["click"] * 8
    assert [event.click for event in first[1:]] == list(range(8))
    assert [event.points for event in first[1:]] == [1, 2, 3, 4, 5, 6, 6, 6]


def test_several_prompts_come_now_and_then():
    clicks = [event for event in plan_crowd(50, HABITS, 100.0, "") if event.kind == "click"]
    several = [event.prompts for event in clicks if event.prompts > 1]
    assert set(several) == set(range(2, 9))
    assert 0.05 < len(several) / len(clicks) < 0.15


def test_a_row_keeps_answers_and_refusals_apart():
    seen = outcomes(10, 20, 30, 1000) + outcomes(5, 7, reason="QUEUE_FULL", retry_s=0.5)
    made = row("overload", [*seen, *outcomes(9, reason="DEADLINE_EXCEEDED")])
    assert (made.requests, made.refused, made.without_retry) == (7, 3, 1)
    assert (made.offered_s, made.answered_s) == (0.7, 0.4)
    assert (made.ms_p50, made.ms_p99, made.queue_ms_max) == (30, 1000, 500)
    assert made.stages == "queue 15 / 500, model 1 / 1"
    assert made.refusals == "QUEUE_FULL 2, DEADLINE_EXCEEDED 1"
    assert (made.refusal_ms_p50, made.refusal_ms_p99) == (7, 9)
    assert made.normal_after_s is None
    assert (made.sent_late_ms_p99, made.busy_cores) == (100, 1.5)


def test_a_superseded_click_is_neither_answered_nor_refused():
    made = row("steady", [*outcomes(10, 20), *outcomes(1000, reason=SUPERSEDED)])
    assert (made.requests, made.answered_s, made.superseded, made.refused) == (3, 0.2, 1, 0)
    assert made.ms_p99 == 20


def test_no_answers_have_no_latency():
    made = row("overload", outcomes(5, reason="QUEUE_FULL", retry_s=0.5))
    assert made.ms_p50 is made.ms_p99 is made.queue_ms_max is None
    assert percentile([], 50) is None


def test_normal_is_when_the_last_slow_or_refused_request_has_ended():
    assert normal_after_s(outcomes(10, 20), unloaded_ms=10) == 0
    assert normal_after_s(outcomes(10, 31, 20), unloaded_ms=10) == pytest.approx(1.031)
    late = [*outcomes(10, 20), Outcome("click", 4.0, 2.0, "QUEUE_FULL", 0.5)]
    assert normal_after_s(late, unloaded_ms=10) == pytest.approx(4.002)


def test_rows_come_back_from_their_file_as_they_were(tmp_path):
    rows = [row("overload", outcomes(10, 20)), row("recovery", [], unloaded_ms=10.0)]
    path = results_path(tmp_path, "load", "NVIDIA H100 80GB")
    assert path.name == "load-nvidia-h100-80gb.csv"
    write_rows(path, Row, rows)
    assert read_rows(Row, path) == rows
    path.write_text("scenario,phase\n")
    with pytest.raises(ValueError, match="columns"):
        read_rows(Row, path)


def test_tables_say_what_an_overload_was_allowed(tmp_path):
    rows = [
        row("unloaded", outcomes(100)),
        row("overload", outcomes(700) + outcomes(3, reason="QUEUE_FULL", retry_s=1.0)),
        row("recovery", outcomes(90), unloaded_ms=100.0),
    ]
    write_rows(tmp_path / "load-cpu.csv", Row, rows)
    document = tmp_path / "README.md"
    document.write_text("a\n<!-- load: scenario=overload -->\nold\n<!-- end of load -->\nb\n")
    [(_, text)] = collect_files([document], tmp_path).items()
    assert "accepted p99 700 ms of 800 allowed" in text
    assert "as without load 0.0 s after" in text
    assert text.startswith("a\n<!-- load: scenario=overload -->\n")
    assert "old" not in text
    assert build_tables([]) == "Not measured yet.\n"
