"""Figures of many answers."""

from collections.abc import Mapping, Sequence

import numpy as np


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Of what was seen, never between two values."""
    return float(np.percentile(values, percent, method="higher")) if values else None


def describe_stages(answers: Sequence[Mapping[str, float]]) -> str:
    """p50 / p99 of each stage, as in `queue 15 / 500, model 1 / 1`.

    Args:
        answers: for each the milliseconds of all stages.
    """
    return ", ".join(
        f"{stage} {percentile(spent, 50):.3g} / {percentile(spent, 99):.3g}"
        for stage in (answers[0] if answers else ())
        if (spent := [answer[stage] for answer in answers])
    )
