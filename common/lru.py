"""Values kept in memory under a budget of bytes, the least recently used leaving first."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ByteBudgetLRU(Generic[Key, Value]):
    """A least-recently-used map; not thread-safe, for use on one event loop.

    Args:
        budget_bytes: what all values together may take; a single larger value is not kept.
    """

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Value | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def put(self, key: Key, value: Value, size_bytes: int) -> int:
        """Keep a value; how many others had to leave for it."""
        self.discard(key)
        if size_bytes > self.budget_bytes:
            return 0
        before = len(self._entries)
        self._entries[key] = (value, size_bytes)
        self.used_bytes += size_bytes
        while self.used_bytes > self.budget_bytes:
            _, (_, dropped_bytes) = self._entries.popitem(last=False)
            self.used_bytes -= dropped_bytes
        return before + 1 - len(self._entries)

    def clear(self) -> None:
        self._entries.clear()
        self.used_bytes = 0

    def discard(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.used_bytes -= entry[1]
