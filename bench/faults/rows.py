"""The rows of the fault table, and the CSV that keeps them."""

from dataclasses import dataclass

NORMAL_LIMIT_S = 10.0


@dataclass(frozen=True)
class Row:
    """What callers saw of one fault.

    Args:
        fault_s: how long it lasted.
        calls: operations of the load, before, in and after it.
        wrong_masks: answers that are not those of the undisturbed run.
        least_iou: of any answer with that of the undisturbed run; None when none was answered.
        hangs: operations that went on after their deadline.
        crashes: processes that ended without being told to.
        library_errors: what the client library raised: reasons and how often.
        raw_errors: the same of calls through the stubs, which nothing sends again.
        slowest_s: the longest operation.
        normal_s: from the end of the fault until every replica is ready and the last failure is over.
    """

    fault: str
    fault_s: float
    calls: int
    wrong_masks: int
    least_iou: float | None
    hangs: int
    crashes: int
    library_errors: str
    raw_errors: str
    slowest_s: float
    normal_s: float
    device: str
    torch: str
    redis: str
    commit: str
    command: str

    @property
    def key(self) -> tuple[str]:
        """A later run replaces the row of the same fault."""
        return (self.fault,)

    @property
    def is_survived(self) -> bool:
        """No wrong mask, no hang, no crash, normal soon after, and no failed call where nothing may be noticed."""
        noticed = "rolling-restart" in self.fault and self.library_errors
        return not (self.wrong_masks or self.hangs or self.crashes or noticed) and self.normal_s <= NORMAL_LIMIT_S
