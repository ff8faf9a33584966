"""Who is served next: one lane after the other, and in a lane every tenant its share of the work.

Start-time fair queueing (Goyal, Vin and Cheng, 1996), so that a tenant's flood delays mostly that tenant:

add:   turn = the later of: the turn served last, the end of the tenant's entry before this one
       the tenant's next entry begins at turn + weight
take:  the lowest lane, there the lowest turn, of equals the older
"""

import bisect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Other = TypeVar("Other")


class Lane(IntEnum):
    """Which queue an entry waits in; a lower lane is served first."""

    CLICK = 0
    BULK = 1


@dataclass(frozen=True)
class Place(Generic[Item]):
    """An entry and where it belongs.

    Args:
        weight: work units.
        turn: when it is due, in work units of its lane.
        number: counts places, to tell equal turns apart.
    """

    item: Item
    lane: Lane
    tenant: str
    weight: int
    turn: int
    number: int


class FairQueue(Generic[Item]):
    """Places in the order of service. Small enough to be searched from end to end: its owner bounds it."""

    def __init__(self) -> None:
        self._lanes: dict[Lane, list[Place[Item]]] = {lane: [] for lane in Lane}
        self._ends: dict[Lane, dict[str, int]] = {lane: {} for lane in Lane}
        self._now = dict.fromkeys(Lane, 0)
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def __iter__(self) -> "itertools.chain[Place[Item]]":
        return itertools.chain.from_iterable(self._lanes.values())

    @property
    def weight(self) -> int:
        """All work that waits."""
        return sum(place.weight for place in self)

    def make_place(self, item: Other, lane: Lane, tenant: str, weight: int) -> Place[Other]:
        """Where an entry would wait; it does so only once it is added."""
        turn = max(self._now[lane], self._ends[lane].get(tenant, 0))
        return Place(item, lane, tenant, weight, turn, next(self._numbers))

    def weight_before(self, place: Place[Any]) -> int:
        """Work that is served before a place."""
        return sum(other.weight for other in self if _order(other) < _order(place))

    def is_last(self, place: Place[Any]) -> bool:
        """Nobody would be served after this place."""
        last = self.last()
        return last is None or _order(last) <= _order(place)

    def add(self, place: Place[Item]) -> None:
        bisect.insort(self._lanes[place.lane], place, key=_order)
        self._ends[place.lane][place.tenant] = place.turn + place.weight

    def promote(self, place: Place[Item], item: Item, lane: Lane) -> Place[Item]:
        """Move an entry, now as `item`, behind its tenant's others in another lane; the one it leaves stays charged."""
        self._lanes[place.lane] = [other for other in self._lanes[place.lane] if other is not place]
        moved = self.make_place(item, lane, place.tenant, place.weight)
        self.add(moved)
        return moved

    def last(self) -> Place[Item] | None:
        return next((places[-1] for places in reversed(self._lanes.values()) if places), None)

    def first(self, lane: Lane) -> Place[Item] | None:
        return self._lanes[lane][0] if self._lanes[lane] else None

    def take_first(self, lane: Lane) -> Place[Item]:
        """Remove the place that is due in a lane, which has one."""
        place = self._lanes[lane].pop(0)
        self._now[lane] = place.turn
        if not self._lanes[lane]:  # with nobody waiting there is nothing to share: debts end, but the latest one
            self._now[lane] = 0
            self._ends[lane] = {place.tenant: place.weight}
        return place

    def remove(self, is_gone: Callable[[Item], bool]) -> int:
        """Drop entries, and say how many."""
        before = len(self)
        for lane, places in self._lanes.items():
            self._lanes[lane] = [place for place in places if not is_gone(place.item)]
        return before - len(self)

    def drop_last(self) -> Place[Item]:
        """Take the entry away that would have been served last; its tenant is not charged for it."""
        place = self._lanes[max(lane for lane, places in self._lanes.items() if places)].pop()
        self._ends[place.lane][place.tenant] = place.turn
        return place


def _order(place: Place[Any]) -> tuple[int, int, int]:
    return place.lane, place.turn, place.number
