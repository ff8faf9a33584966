"""The rows of the load generator: one kind of request in one phase of a run."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bench.figures import describe_stages, percentile
from bench.load.annotators import Kind
from bench.load.crowd import OK, Outcome
from bench.load.streams import SUPERSEDED
from bench.load.watch import Watched

# Of the unloaded p99, what an accepted request may take under overload besides its time in the queue.
ALLOWED_FACTOR = 3


@dataclass(frozen=True)
class Figures:
    """Latencies are in milliseconds, counted from when a request was due. None is a figure that does not exist there.

    Args:
        scenario: `steady`, or `overload` with its phases `unloaded`, `overload` and `recovery`.
        offered_s: requests a second.
        answered_s: answers a second.
        superseded: clicks on a stream that their annotator's next one overtook in the queue; none without streams.
        refusals: how many by reason.
        without_retry: of them, those that were not told when to come again.
        queue_ms_mean: of all entries, by the service's metric; `queue_ms_max` is of answers.
        stages: of answers, p50 / p99 of the milliseconds that the service says it spent on each.
        fill: work units in a batch, on average: images or prompts.
        rss_mib: most resident memory of the service.
        bound_ms: longest wait for a batch that the service was set to.
        sent_late_ms_p99: how long after they were due the requests left: what of their latency is the generator's own.
        cores, busy_cores: of the machine, with all that ran on it; None, as the last, in rows of before there were any.
        normal_after_s: recovery: end of the last request that was refused or took over three times the unloaded p99.
    """

    scenario: str
    phase: str
    kind: str
    seconds: float
    annotators: int
    requests: int
    offered_s: float
    answered_s: float
    ms_p50: float | None
    ms_p90: float | None
    ms_p99: float | None
    ms_p999: float | None
    superseded: int
    refused: int
    refusals: str
    refusal_ms_p50: float | None
    refusal_ms_p99: float | None
    without_retry: int
    queue_ms_mean: float | None
    queue_ms_max: float | None
    stages: str
    fill: float | None
    rss_mib: float
    bound_ms: int
    normal_after_s: float | None
    sent_late_ms_p99: float | None
    cores: int | None
    busy_cores: float | None


@dataclass(frozen=True)
class Environment:
    """The columns that are the same in all rows of a run.

    Args:
        device: of the services.
        load_before: the machine's load average over a minute, before the services were started.
    """

    device: str
    model: str
    load_before: float
    torch: str
    grpcio: str
    commit: str
    command: str


@dataclass(frozen=True)
class Row(Environment, Figures):
    """One kind of request in one phase. Its columns begin with those of the last base: figures, environment."""


@dataclass(frozen=True)
class Phase:
    """What a phase of a run was."""

    scenario: str
    name: str
    seconds: float
    annotators: int


def summarise(
    phase: Phase,
    kind: Kind,
    outcomes: Sequence[Outcome],
    watched: Watched,
    bound_ms: int,
    environment: Environment,
    busy_cores: float,
    unloaded_ms: float | None = None,
) -> Row:
    """One row of a phase's outcomes of a kind.

    Args:
        busy_cores: of the machine, in that time.
        unloaded_ms: p99 without load, for a phase of recovery.
    """
    answers = [outcome for outcome in outcomes if outcome.reason == OK]
    answered = [outcome.latency_ms for outcome in answers]
    refused = [outcome for outcome in outcomes if outcome.reason not in (OK, SUPERSEDED)]
    counts = Counter(outcome.reason for outcome in refused)
    return Row(
        scenario=phase.scenario,
        phase=phase.name,
        kind=kind,
        seconds=phase.seconds,
        annotators=phase.annotators,
        requests=len(outcomes),
        offered_s=len(outcomes) / phase.seconds,
        answered_s=len(answered) / phase.seconds,
        ms_p50=percentile(answered, 50),
        ms_p90=percentile(answered, 90),
        ms_p99=percentile(answered, 99),
        ms_p999=percentile(answered, 99.9),
        superseded=len(outcomes) - len(answered) - len(refused),
        refused=len(refused),
        refusals=", ".join(f"{reason} {count}" for reason, count in counts.most_common()),
        refusal_ms_p50=percentile([outcome.latency_ms for outcome in refused], 50),
        refusal_ms_p99=percentile([outcome.latency_ms for outcome in refused], 99),
        without_retry=sum(not outcome.retry_s for outcome in refused),
        queue_ms_mean=watched.queue_ms,
        queue_ms_max=max((outcome.stages_ms["queue"] for outcome in answers), default=None),
        stages=describe_stages([outcome.stages_ms for outcome in answers]),
        fill=watched.fill,
        rss_mib=watched.rss_mib,
        bound_ms=bound_ms,
        normal_after_s=None if unloaded_ms is None else normal_after_s(outcomes, unloaded_ms),
        sent_late_ms_p99=percentile([outcome.sent_late_ms for outcome in outcomes], 99),
        cores=os.cpu_count(),
        busy_cores=busy_cores,
        **vars(environment),
    )


def normal_after_s(outcomes: Sequence[Outcome], unloaded_ms: float) -> float:
    """When the last request that was not as without load had ended, from the start of the phase; 0 if all were."""
    late = [
        outcome.at_s + outcome.latency_ms / 1000
        for outcome in outcomes
        if outcome.reason not in (OK, SUPERSEDED) or outcome.latency_ms > ALLOWED_FACTOR * unloaded_ms
    ]
    return max(late, default=0.0)


def allowed_ms(unloaded: Row, overload: Row) -> float | None:
    """The longest p99 that an overload may leave to those it accepts."""
    return None if unloaded.ms_p99 is None else ALLOWED_FACTOR * unloaded.ms_p99 + overload.bound_ms
