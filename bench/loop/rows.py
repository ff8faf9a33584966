"""The rows of the loop benchmark: clicks at one rate, made in one way, on a decoder service without its model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bench.figures import percentile
from bench.load.crowd import OK, Outcome

CALLS, STREAMS = "calls", "streams"
# In every row, so that none is ever quoted as what a click takes.
WITHOUT_THE_MODEL = "without the model"


@dataclass(frozen=True)
class Setting:
    """What was run.

    Args:
        subject: WITHOUT_THE_MODEL.
        wait_ms: of every batch, in the model's place.
        rate_s: clicks that are sent a second.
        way: CALLS makes a PredictMasks for each click, STREAMS keeps a PredictMasksStream open for each annotator.
        load_before: the machine's load average over a minute, before the service was started.
    """

    subject: str
    wait_ms: float
    rate_s: float
    way: str
    annotators: int
    seconds: float
    load_before: float


@dataclass(frozen=True)
class Usage:
    """Processor seconds that the service used while it was measured.

    Args:
        loop_s: of the thread with the event loop.
        process_s: of all threads.
    """

    loop_s: float
    process_s: float


@dataclass(frozen=True)
class Figures:
    """What was seen; None without answers.

    Args:
        clicks: sent; all have ended.
        unanswered: how many by reason.
        loop_ms: processor time of the event loop's thread for one answered click.
        process_ms: the same of the whole process.
        loop_share: of the time from the first click to the end of the last, what the event loop was busy.
        ms_p50, ms_p99: from when a click was due to its answer, the wait in the model's place included.
    """

    clicks: int
    answered_s: float
    unanswered: str
    loop_ms: float | None
    process_ms: float | None
    loop_share: float
    ms_p50: float | None
    ms_p99: float | None


@dataclass(frozen=True)
class Row(Figures, Setting):
    """One run. Its columns begin with those of the last base: setting, figures, machine."""

    gpu: str
    torch: str
    triton: str
    grpcio: str
    commit: str
    command: str

    @property
    def key(self) -> tuple[str | float, ...]:
        """What one run measures, and a later one replaces."""
        return self.gpu, self.wait_ms, self.annotators, self.rate_s, self.way


def summarise(
    setting: Setting, outcomes: Sequence[Outcome], took_s: float, usage: Usage, machine: dict[str, str]
) -> Row:
    """A run as a row.

    Args:
        took_s: until the last click had ended.
        machine: the columns gpu, torch, triton, grpcio, commit and command.
    """
    answered = [outcome.latency_ms for outcome in outcomes if outcome.reason == OK]
    reasons = Counter(outcome.reason for outcome in outcomes if outcome.reason != OK)
    return Row(
        **vars(setting),
        clicks=len(outcomes),
        answered_s=len(answered) / took_s,
        unanswered=", ".join(f"{reason} {count}" for reason, count in reasons.most_common()),
        loop_ms=1000 * usage.loop_s / len(answered) if answered else None,
        process_ms=1000 * usage.process_s / len(answered) if answered else None,
        loop_share=usage.loop_s / took_s,
        ms_p50=percentile(answered, 50),
        ms_p99=percentile(answered, 99),
        **machine,
    )


def describe_row(row: Row) -> str:
    """One line for people."""

    def show(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    return (
        f"{row.subject} ({row.wait_ms:g} ms in its place), by {row.way}: {row.rate_s:g} clicks a second sent and "
        f"{row.answered_s:.4g} answered, {show(row.loop_ms)} ms of the event loop and {show(row.process_ms)} of the "
        f"process each, the loop {row.loop_share:.0%} busy; ms p50 {show(row.ms_p50)}, p99 {show(row.ms_p99)}"
        f"; unanswered {row.unanswered or 'none'}"
    )
