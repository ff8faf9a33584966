"""The memory tier: what stays, what leaves, and that the bytes add up."""

from hypothesis import given
from hypothesis import strategies as st

from splitsam.common.lru import ByteBudgetLRU


def filled(budget_bytes: int, *sizes: int) -> ByteBudgetLRU[int, str]:
    lru: ByteBudgetLRU[int, str] = ByteBudgetLRU(budget_bytes)
    for key, size_bytes in enumerate(sizes):
        lru.put(key, f"value {key}", size_bytes)
    return lru


def kept(lru: ByteBudgetLRU[int, str], keys: int) -> list[int]:
    return [key for key in range(keys) if lru.get(key) is not None]


def test_the_least_recently_put_leaves_first_when_the_budget_is_full():
    lru = filled(30, 10, 10, 10, 10)
    assert kept(lru, 4) == [1, 2, 3]
    assert (len(lru), lru.used_bytes) == (3, 30)


def test_a_read_keeps_an_entry_longer():
    lru = filled(30, 10, 10, 10)
    assert lru.get(0) == "value 0"
    lru.put(3, "value 3", 10)
    assert kept(lru, 4) == [0, 2, 3]


def test_a_large_value_displaces_several():
    assert kept(filled(30, 10, 10, 10, 25), 4) == [3]


def test_put_says_how_many_had_to_leave():
    lru = filled(30, 10, 10, 10)
    assert lru.put(3, "small", 5) == 1
    assert lru.put(3, "small anew", 5) == 0
    assert lru.put(4, "too large", 31) == 0
    assert lru.put(5, "large", 30) == 3
    assert 5 in lru
    assert 3 not in lru


def test_a_value_larger_than_the_budget_is_not_kept_and_displaces_nothing():
    lru = filled(30, 10, 31)
    assert kept(lru, 2) == [0]
    assert lru.used_bytes == 10


def test_a_larger_value_under_a_kept_key_removes_the_old_one():
    lru = filled(30, 10)
    lru.put(0, "too large", 31)
    assert lru.get(0) is None
    assert lru.used_bytes == 0


def test_replacing_a_value_counts_its_bytes_once():
    lru = filled(30, 10)
    lru.put(0, "again", 12)
    assert (lru.get(0), lru.used_bytes, len(lru)) == ("again", 12, 1)


def test_discarding_frees_the_bytes_and_ignores_the_unknown():
    lru = filled(30, 10)
    lru.discard(0)
    lru.discard(99)
    assert (lru.get(0), lru.used_bytes, len(lru)) == (None, 0, 0)


def test_a_budget_of_nothing_keeps_nothing():
    assert kept(filled(0, 1), 1) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40), st.booleans()), max_size=60))
def test_the_bytes_add_up_and_stay_within_the_budget(steps: list[tuple[int, int, bool]]):
    lru: ByteBudgetLRU[int, int] = ByteBudgetLRU(50)
    for key, size_bytes, discard in steps:
        if discard:
            lru.discard(key)
        else:
            lru.put(key, size_bytes, size_bytes)
        present = [size for candidate in range(6) if (size := lru.get(candidate)) is not None]
        assert lru.used_bytes == sum(present) <= 50
        assert len(lru) == len(present)
