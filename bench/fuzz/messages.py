"""Messages of any kind, built from their descriptors: sensible values, extreme ones, and the two mixed."""

import re
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from bench.fuzz.mutate import EXTREME_FLOATS, EXTREME_INTS, mutate

WIDTH, HEIGHT = 640, 480  # of the images that sensible prompts are about
KEYS = tuple(f"{number:02x}" * 32 for number in range(64))
_LOGITS_BYTES = 131_072
_STRINGS = (
    *("", "0", "0A" * 32, "0a" * 31, "0a" * 33, "g" * 64, "0a" * 32 + "\n"),
    *("é" * 64, "\0" * 64, "٣" * 64, "x" * 5000),
)
_NEEDED = ("images", "prompts")  # at least one
_COUNTS = (0, 1, 1, 1, 2, 3)
_MANY = (33, 65, 257, 1025, 2049)
_SENSIBLE: Mapping[str, Callable[[Random], Any]] = {
    "embedding_key": lambda random: random.choice(KEYS),
    "x": lambda random: random.uniform(0, WIDTH),
    "y": lambda random: random.uniform(0, HEIGHT),
    "x0": lambda random: random.uniform(0, 300),
    "y0": lambda random: random.uniform(0, 200),
    "x1": lambda random: random.uniform(301, WIDTH),
    "y1": lambda random: random.uniform(201, HEIGHT),
    "label": lambda random: random.choice((1, 2)),
    "selection": lambda random: random.choice((0, 1, 2, 3)),
    "formats": lambda random: random.choice((1, 2, 3, 4, 5)),
    "refinement_token": lambda random: random.randbytes(32).hex(),
    "low_res_logits": lambda random: random.choice((bytes(_LOGITS_BYTES), b"\x00\x3c" * (_LOGITS_BYTES // 2))),
    "image_sha256": lambda random: random.randbytes(32),
    "points_per_side": lambda random: random.choice((1, 2, 32)),
    "points_per_batch": lambda random: random.choice((1, 7, 64)),
    "point_grid": lambda random: random.random(),
    "crop_layers": lambda random: random.choice((0, 0, 1, 2)),
    "crop_points_downscale_factor": lambda random: random.choice((1, 2)),
    "xy": lambda random: random.random(),
}
_EXTREME_BYTES = (
    *(b"", bytes(31), bytes(33), bytes(_LOGITS_BYTES - 1), bytes(_LOGITS_BYTES + 2)),
    b"\x00\x7e" + bytes(_LOGITS_BYTES - 2),  # one NaN
    bytes(_LOGITS_BYTES - 2) + b"\x00\xfc",  # one infinity
)


def build_message(random: Random, descriptor: Descriptor, wildness: float) -> Message:
    """A message with each field set or not.

    Args:
        wildness: how many of the values are extreme, 0 to 1.
    """
    message = message_factory.GetMessageClass(descriptor)()
    for group in descriptor.oneofs:
        chosen = random.choice((None, *group.fields)) if random.random() < 0.5 else group.fields[0]
        if chosen is not None:
            _fill(random, message, chosen, wildness)
    for field in descriptor.fields:
        if field.containing_oneof is None and random.random() < 0.85:
            _fill(random, message, field, wildness)
    return message


def make_bytes(random: Random, descriptor: Descriptor) -> bytes:
    """A message on the wire: as built, damaged, or noise."""
    if random.random() < 0.03:
        return random.randbytes(random.randrange(300))
    data = build_message(random, descriptor, random.choice((0.0, 0.02, 0.1, 0.5, 1.0))).SerializePartialToString()
    return mutate(random, data, [data, bytes(range(256))]) if random.random() < 0.3 else data


def is_path(descriptor: Descriptor, path: str) -> bool:
    """Whether a path as `images[0].prompts[2].box.x0` names a field of such a message, or of the request at all."""
    here: Descriptor | None = descriptor
    for part in path.split("."):
        field = None if here is None else here.fields_by_name.get(re.sub(r"\[\d+\]$", "", part))
        if field is None:
            return False
        here = field.message_type
    return True


def _fill(random: Random, message: Message, field: FieldDescriptor, wildness: float) -> None:
    if field.is_repeated:
        is_long = random.random() < 0.02 * wildness
        count = random.choice(_MANY) if is_long and not field.message_type else random.choice(_COUNTS)
        if random.random() >= wildness:
            count = min(count, 1) if field.type == FieldDescriptor.TYPE_ENUM else max(count, field.name in _NEEDED)
        container = getattr(message, field.name)
        for _ in range(count):
            if field.message_type is None:
                container.append(_value(random, field, wildness))
            else:
                container.add().CopyFrom(build_message(random, field.message_type, wildness))
        if is_long and field.message_type and container:
            container.MergeFrom([container[0]] * random.choice(_MANY))
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(build_message(random, field.message_type, wildness))
    else:
        setattr(message, field.name, _value(random, field, wildness))


def _value(random: Random, field: FieldDescriptor, wildness: float) -> Any:
    kind = field.cpp_type
    if random.random() >= wildness and field.name in _SENSIBLE:
        value = _SENSIBLE[field.name](random)
        return int(value) if kind == FieldDescriptor.CPPTYPE_UINT32 else value
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return random.choice((0, 1, 2, 3, 4, 5, 6, -1, 2**31 - 1, -(2**31)))
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return random.choice((*EXTREME_FLOATS, random.random())) if random.random() < wildness else random.random()
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return random.random() < 0.5
    if field.type == FieldDescriptor.TYPE_STRING:
        return random.choice((*_STRINGS, *KEYS))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return random.choice((*_EXTREME_BYTES, random.randbytes(random.randrange(200))))
    bits = 64 if kind in (FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_INT64) else 32
    return random.choice((*EXTREME_INTS, 2**63, 2**64 - 1)) % 2**bits
