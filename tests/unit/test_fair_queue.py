"""The order of service: lanes, then tenants in turn by the work they were given."""

import random

from splitsam.common.fair_queue import FairQueue, Lane, Place


def add(queue: FairQueue[str], *names: str, lane: Lane = Lane.CLICK, weight: int = 1) -> list[Place[str]]:
    """Entries named after their tenant, the first letter."""
    places = []
    for name in names:
        places.append(queue.make_place(name, lane, name[0], weight))
        queue.add(places[-1])
    return places


def take(queue: FairQueue[str], count: int = 100, lane: Lane = Lane.CLICK) -> str:
    taken = []
    while queue.first(lane) and len(taken) < count:
        taken.append(queue.take_first(lane).item)
    return " ".join(taken)


def test_one_tenant_is_served_in_order_of_arrival():
    queue: FairQueue[str] = FairQueue()
    add(queue, "a1", "a2", "a3")
    assert take(queue) == "a1 a2 a3"


def test_a_newcomer_does_not_wait_for_all_of_a_flood():
    queue: FairQueue[str] = FairQueue()
    add(queue, *(f"a{n}" for n in range(1, 6)))
    assert take(queue, 2) == "a1 a2"
    add(queue, "b1", "b2", "c1")
    assert take(queue) == "b1 c1 a3 b2 a4 a5"


def test_heavy_work_counts_as_much_as_many_light_ones():
    queue: FairQueue[str] = FairQueue()
    add(queue, "a1", "a2", weight=4)
    add(queue, *(f"b{n}" for n in range(1, 7)))
    assert take(queue) == "a1 b1 b2 b3 b4 a2 b5 b6"


def test_one_who_always_has_an_entry_waiting_leaves_others_their_turn():
    queue: FairQueue[str] = FairQueue()
    add(queue, "b1", "b2", "b3", "a1")
    order = []
    for _ in range(5):
        order.append(take(queue, 1))
        if order[-1].startswith("a"):
            add(queue, "a")
    assert order == ["b1", "a1", "b2", "a", "b3"]


def test_shares_are_equal_while_everybody_wants_more():
    queue: FairQueue[str] = FairQueue()
    chance = random.Random(1)
    served = dict.fromkeys("abc", 0)
    demand = {"a": 20, "b": 3, "c": 1}
    for _ in range(600):
        for tenant, most in demand.items():
            while sum(place.tenant == tenant for place in queue) < most:
                add(queue, tenant, weight=chance.randint(1, 8))
        place = queue.take_first(Lane.CLICK)
        served[place.tenant] += place.weight
    assert max(served.values()) - min(served.values()) <= 2 * 8


def test_what_was_dropped_for_want_of_room_is_not_charged():
    queue: FairQueue[str] = FairQueue()
    add(queue, "a1", "a2", "a3", "b1", "b2")
    assert queue.drop_last().item == "a3"
    assert queue.drop_last().item == "b2"
    add(queue, "a4", "b3")
    assert take(queue) == "a1 b1 a2 b3 a4"


def test_weight_before_a_place_is_what_will_be_served_before_it():
    queue: FairQueue[str] = FairQueue()
    add(queue, "a1", "a2", "b1", weight=2)
    add(queue, "a9", lane=Lane.BULK, weight=5)
    assert queue.weight == 11
    click = queue.make_place("b2", Lane.CLICK, "b", 1)
    assert queue.weight_before(click) == 6
    assert not queue.is_last(click)
    bulk = queue.make_place("c1", Lane.BULK, "c", 1)
    assert queue.weight_before(bulk) == 11
    assert queue.is_last(bulk)
    assert queue.last().item == "a9"


def test_removed_entries_leave_the_others_in_order():
    queue: FairQueue[str] = FairQueue()
    add(queue, "a1", "b1", "a2", "b2")
    assert queue.remove(lambda item: item.startswith("b")) == 2
    assert take(queue) == "a1 a2"


def test_an_idle_lane_remembers_no_tenant_but_the_last():
    queue: FairQueue[str] = FairQueue()
    for _ in range(3):
        add(queue, *"abcdefgh")
        take(queue)
    assert [len(ends) for ends in queue._ends.values()] == [1, 0]


def test_a_promoted_entry_waits_behind_its_tenants_others_in_the_other_lane():
    queue: FairQueue[str] = FairQueue()
    _, place, _ = add(queue, "a1", "a2", "b1", lane=Lane.BULK, weight=2)
    add(queue, "a3", "b3", "b4")
    moved = queue.promote(place, "a2'", Lane.CLICK)
    assert (moved.lane, moved.weight, len(queue)) == (Lane.CLICK, 2, 6)
    assert queue.weight_before(moved) == 3
    assert take(queue) == "a3 b3 b4 a2'"
    assert take(queue, lane=Lane.BULK) == "a1 b1"


def test_a_lane_that_promotion_has_emptied_goes_on():
    queue: FairQueue[str] = FairQueue()
    [place] = add(queue, "a1", lane=Lane.BULK)
    queue.promote(place, "a1", Lane.CLICK)
    assert queue.first(Lane.BULK) is None
    assert queue.last().item == "a1"
    add(queue, "b1", lane=Lane.BULK)
    assert take(queue) == "a1"
    assert take(queue, lane=Lane.BULK) == "b1"
