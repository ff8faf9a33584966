"""The rows of the fuzzing table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What became of the inputs of one target, or of the requests of one kind.

    Args:
        engine: `atheris`, which follows branches; `seeded`, which does not; `grpc` for requests over the wire.
        outcomes: what came of how many, as in `decoded PNG 12; INVALID_ARGUMENT 3`.
        crashes: inputs that broke the property, one for each place in the code; over the wire, answers INTERNAL or
            UNKNOWN, hangs and processes that ended.
        kept: inputs that found new branches; 0 where nobody looked.
        peak_mib: most memory resident in the process that read the inputs.
        versions: of what the results hang on.
    """

    target: str
    engine: str
    inputs: int
    seconds: float
    outcomes: str
    crashes: int
    kept: int
    peak_mib: float
    seed: int
    device: str
    versions: str
    commit: str
    command: str

    @property
    def key(self) -> tuple[str, str]:
        """A later run replaces the row of the same target and engine."""
        return self.target, self.engine


def describe_outcomes(outcomes: dict[str, int]) -> str:
    """The most frequent first."""
    ordered = sorted(outcomes.items(), key=lambda item: (-item[1], item[0]))
    return "; ".join(f"{outcome} {count}" for outcome, count in ordered)
