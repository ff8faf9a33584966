"""Damage to bytes, and numbers and texts at the edges of what their types hold."""

from collections.abc import Callable, Sequence
from random import Random

EXTREME_BYTES = (0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF)
EXTREME_INTS = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
EXTREME_FLOATS = (
    *(0.0, -0.0, 1.0, -1.0, 0.5, 100.0, 100.001, -100.0, 640.0, 640.00006, 480.0, 1e-45, -1e-45, 1.1754944e-38),
    *(3.4028235e38, -3.4028235e38, 16777217.0, 2147483648.0, float("nan"), float("inf"), float("-inf")),
)
Mutation = Callable[[Random, bytearray, Sequence[bytes]], None]


def mutate(random: Random, data: bytes, others: Sequence[bytes], *, longest: int = 2**20) -> bytes:
    """The bytes after one to a dozen accidents.

    Args:
        others: what pieces are taken from.
        longest: what lies behind is cut off.
    """
    damaged = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 2, 3, 6, 12))):
        random.choice(_MUTATIONS)(random, damaged, others)
    return bytes(damaged[:longest])


def _flip_bit(random: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _set_byte(random: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    if data:
        data[random.randrange(len(data))] = random.choice((*EXTREME_BYTES, random.randrange(256)))


def _set_int(random: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    size = random.choice((2, 4, 8))
    if len(data) >= size:
        start = random.randrange(len(data) - size + 1)
        value = random.choice(EXTREME_INTS) % 2 ** (8 * size)
        data[start : start + size] = value.to_bytes(size, random.choice(("big", "little")))


def _truncate(random: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    del data[random.randrange(len(data) + 1) :]


def _delete(random: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    start, end = _piece(random, data)
    del data[start:end]


def _repeat(random: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    start, end = _piece(random, data)
    data[end:end] = data[start:end] * random.choice((1, 1, 2, 8))


def _insert(random: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    start = random.randrange(len(data) + 1)
    data[start:start] = random.randbytes(random.choice((1, 2, 4, 9, 33)))


def _extend(random: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    data += random.choice((bytes(1), bytes(1000), b"\xff" * 7, random.randbytes(17)))


def _splice(random: Random, data: bytearray, others: Sequence[bytes]) -> None:
    """A piece of another input in place of one of this."""
    other = random.choice(others)
    start, end = _piece(random, data)
    first, last = _piece(random, other)
    data[start:end] = other[first:last]


def _swap(random: Random, data: bytearray, _others: Sequence[bytes]) -> None:
    start, end = _piece(random, data)
    moved = data[start:end]
    del data[start:end]
    place = random.randrange(len(data) + 1)
    data[place:place] = moved


def _piece(random: Random, data: bytes | bytearray) -> tuple[int, int]:
    """Where a piece begins and ends; short ones more often than long ones."""
    start = random.randrange(len(data) + 1)
    longest = random.choice((4, 16, 64, len(data)))
    return start, min(len(data), start + random.randrange(longest + 1))


_MUTATIONS: tuple[Mutation, ...] = (
    *(_flip_bit, _set_byte, _set_byte, _set_int, _set_int, _truncate, _delete, _repeat),
    *(_insert, _extend, _splice, _splice, _swap),
)
