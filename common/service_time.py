"""How long a batch of a given weight takes, learned from those that ran: base + per_unit * weight.

A least-squares line through recent batches, each new one weighing a tenth of all. Weights not seen yet lie on the
line; before two different ones are seen the line is flat, so that no figure is assumed that was not measured.
"""

_LEAST_SHARE = 0.1


class ServiceTime:
    """A smoothed estimate of a batch's seconds."""

    def __init__(self) -> None:
        self._count = 0
        self._mean_weight = 0.0
        self._mean_s = 0.0
        self._variance = 0.0
        self._covariance = 0.0

    def observe(self, weight: int, seconds: float) -> None:
        self._count += 1
        share = max(_LEAST_SHARE, 1 / self._count)
        off_weight, off_s = weight - self._mean_weight, seconds - self._mean_s
        self._mean_weight += share * off_weight
        self._mean_s += share * off_s
        self._variance = (1 - share) * (self._variance + share * off_weight**2)
        self._covariance = (1 - share) * (self._covariance + share * off_weight * off_s)

    def estimate(self, weight: int) -> float:
        """Seconds of a batch of this weight; 0 before any was measured."""
        if not self._variance:
            return self._mean_s
        # Steeper than through the origin, noise would make light batches take less than no time.
        slope = min(max(0.0, self._covariance / self._variance), self._mean_s / self._mean_weight)
        return self._mean_s + slope * (weight - self._mean_weight)
