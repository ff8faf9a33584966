"""The rows of the encode benchmark: one run of clients that never pause."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bench.figures import describe_stages, percentile
from bench.load.crowd import OK, Outcome

NOT_STORED = "NOT_STORED"


@dataclass(frozen=True)
class Setting:
    """The columns that say what was run.

    Args:
        encoders: processes; None, for one, in rows of before there could be more.
        encoder_args: arguments of serve-encoder beside those that follow from the others.
        batch_sizes: of the service on a GPU; a CPU takes one image.
        cores: that the machine gives to all processes together.
    """

    model: str
    precision: str
    batch_sizes: str
    encoders: int | None
    encoder_args: str
    clients: int
    generators: int
    seconds: float
    cores: int


@dataclass(frozen=True)
class Answers:
    """Images whose answers came while it was measured; latencies are in milliseconds.

    Args:
        images: encoded, and stored in Redis.
        model_batch, model_img_s: the model alone on the same device, in its largest batch.
        share: of the model's own images a second, what clients got.
        ms_p50, ms_p90, ms_p99: from the first sending of an image to its answer; None without answers.
        stages: p50 / p99 of the milliseconds that the service says it spent on each.
        refused: how many calls, which were sent again; `refusals` counts them by reason.
        not_stored: images that were encoded and that Redis did not take.
    """

    images: int
    img_s: float
    model_batch: int
    model_img_s: float
    share: float
    ms_p50: float | None
    ms_p90: float | None
    ms_p99: float | None
    stages: str
    refused: int
    refusals: str
    not_stored: int


@dataclass(frozen=True)
class Usage:
    """What the processes behind the answers did meanwhile, on average.

    Args:
        fill: images in a batch; None without batches.
        encoder_cores, redis_cores, clients_cores: busy, by all processes of the kind; Redis has one thread for
            commands.
        redis_sets_s: SET commands a second; an image is two, a claim and the embedding.
        redis_mib_s: received by Redis.
        encoder_mib_first, encoder_mib_last, redis_mib_first, redis_mib_last: resident memory as the measured time began
            and ended; None in rows of before there were any.
    """

    fill: float | None
    encoder_cores: float
    redis_cores: float
    clients_cores: float
    redis_sets_s: float
    redis_mib_s: float
    encoder_mib_first: float | None
    encoder_mib_last: float | None
    redis_mib_first: float | None
    redis_mib_last: float | None


@dataclass(frozen=True)
class Row(Usage, Answers, Setting):
    """One run. Its columns begin with those of the last base: setting, answers, usage, machine."""

    gpu: str
    torch: str
    triton: str
    commit: str
    command: str

    @property
    def key(self) -> tuple[str | int, ...]:
        """What one run measures, and a later one replaces."""
        run = (self.gpu, self.model, self.precision, self.batch_sizes, self.encoder_args)
        return *run, self.clients, self.generators


def describe_memory(first_mib: float | None, last_mib: float | None) -> str:
    """Whole MiB as the measured time began and ended, or nothing."""
    return "" if first_mib is None or last_mib is None else f"{first_mib:.0f} / {last_mib:.0f}"


def summarise(
    setting: Setting,
    model_batch: int,
    model_img_s: float,
    outcomes: Sequence[Outcome],
    usage: Usage,
    machine: dict[str, str],
) -> Row:
    """A run as a row.

    Args:
        outcomes: those that ended from 0 to `setting.seconds` count, whenever they were sent.
        machine: the columns gpu, torch, triton, commit and command.
    """
    ended = [each for each in outcomes if 0 <= each.at_s + each.latency_ms / 1000 < setting.seconds]
    answers = [outcome for outcome in ended if outcome.reason == OK]
    answered = [outcome.latency_ms for outcome in answers]
    refusals = Counter(outcome.reason for outcome in ended if outcome.reason not in (OK, NOT_STORED))
    img_s = len(answers) / setting.seconds
    return Row(
        **vars(setting),
        images=len(answers),
        img_s=img_s,
        model_batch=model_batch,
        model_img_s=model_img_s,
        share=img_s / model_img_s,
        ms_p50=percentile(answered, 50),
        ms_p90=percentile(answered, 90),
        ms_p99=percentile(answered, 99),
        stages=describe_stages([outcome.stages_ms for outcome in answers]),
        refused=refusals.total(),
        refusals=", ".join(f"{reason} {count}" for reason, count in refusals.most_common()),
        not_stored=sum(outcome.reason == NOT_STORED for outcome in ended),
        **vars(usage),
        **machine,
    )
