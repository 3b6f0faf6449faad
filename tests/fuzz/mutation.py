"""Small changes to bytes, of the kinds that break parsers."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

INTERESTING = (
    b"",
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff" * 4,
    b"\xff" * 9 + b"\x01",  # the largest number that a varint holds
    b"\x80" * 10,  # a varint without end
    b"\xff\xff\xff\xff\x07",  # 2**31 - 1
    b"\x80\x80\x80\x80\x10",  # 2**32
    b"\x00" * 8,
    (1 << 63).to_bytes(8, "little"),
    b"\x0b\x0c",  # an old group
    b"\xf0\x9f\x92",  # half a character
)
NUMBERS = (0, 1, 2, 3, 4, 5, 16, 63, 64, 65, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
LARGE_NUMBERS = (*NUMBERS, 1 << 40, 1 << 62, (1 << 64) - 1)
MAX_GROWTH = 4096


def mutate(data: bytes, source: random.Random, others: Sequence[bytes]) -> bytes:
    """Return ``data`` with one to four changes."""
    changed = bytearray(data)
    for _ in range(source.choice((1, 1, 1, 2, 3, 4))):
        source.choice(_CHANGES)(changed, source, others)
    return bytes(changed[: len(data) + MAX_GROWTH])


def mutate_messages(
    messages: Sequence[bytes], source: random.Random, others: Sequence[bytes]
) -> list[bytes]:
    """Return a stream with a message changed, left out, repeated or moved."""
    changed = list(messages)
    kind = source.randrange(8)
    place = source.randrange(len(changed))
    if kind == 0:
        del changed[place]
    elif kind == 1:
        changed.insert(place, changed[source.randrange(len(changed))])
    elif kind == 2:
        changed[place], changed[0] = changed[0], changed[place]
    else:
        changed[place] = mutate(changed[place], source, others)
    return changed


def _flip(data: bytearray, source: random.Random, others: Sequence[bytes]) -> None:
    if data:
        data[source.randrange(len(data))] ^= 1 << source.randrange(8)


def _overwrite(data: bytearray, source: random.Random, others: Sequence[bytes]) -> None:
    if data:
        data[source.randrange(len(data))] = source.randrange(256)


def _place(data: bytearray, source: random.Random, others: Sequence[bytes]) -> None:
    at = source.randint(0, len(data))
    piece = source.choice(INTERESTING)
    data[at : at + (len(piece) if source.random() < 0.5 else 0)] = piece


def _remove(data: bytearray, source: random.Random, others: Sequence[bytes]) -> None:
    at = source.randint(0, len(data))
    del data[at : at + source.randint(1, 16)]


def _repeat(data: bytearray, source: random.Random, others: Sequence[bytes]) -> None:
    at = source.randint(0, len(data))
    data[at:at] = data[at : at + source.randint(1, 64)] * source.choice((1, 2, 20))


def _cut(data: bytearray, source: random.Random, others: Sequence[bytes]) -> None:
    del data[source.randint(0, len(data)) :]


def _splice(data: bytearray, source: random.Random, others: Sequence[bytes]) -> None:
    other = source.choice(others)
    at, start = source.randint(0, len(data)), source.randint(0, len(other))
    data[at : at + source.randint(0, 64)] = other[start : start + source.randint(1, 64)]


_CHANGES: tuple[Callable[[bytearray, random.Random, Sequence[bytes]], None], ...] = (
    _flip,
    _flip,
    _overwrite,
    _place,
    _place,
    _remove,
    _repeat,
    _cut,
    _splice,
)


def mutate_fields(message: Message, source: random.Random, others: Sequence[bytes]) -> None:
    """Change one field of a message, or of one within it, to something that can be sent."""
    fields: Sequence[FieldDescriptor] = message.DESCRIPTOR.fields
    if not fields:
        return
    field = source.choice(fields)
    is_message = field.type == FieldDescriptor.TYPE_MESSAGE
    if not field.is_repeated:
        if is_message:
            inner = getattr(message, field.name)
            if source.random() < 0.1:
                message.ClearField(field.name)
            else:
                mutate_fields(inner, source, others)
        else:
            setattr(
                message, field.name, _value(field, getattr(message, field.name), source, others)
            )
        return
    values = getattr(message, field.name)
    kind = source.randrange(4)
    if kind == 0 and values:
        del values[source.randrange(len(values))]
    elif kind == 1 and values:
        values.extend([values[source.randrange(len(values))]] * source.choice((1, 1, 2, 70)))
    elif is_message and (values or source.random() < 0.5):
        inner = source.choice(values) if values else values.add()
        mutate_fields(inner, source, others)
    elif not is_message:
        value = _value(field, source.choice(values) if values else None, source, others)
        if values and kind == 2:
            values[source.randrange(len(values))] = value
        else:
            values.append(value)


def _value(field: FieldDescriptor, old: Any, source: random.Random, others: Sequence[bytes]) -> Any:
    """Return another value that a field of this type can hold."""
    if field.type == FieldDescriptor.TYPE_BYTES:
        return mutate(old or b"", source, others)
    if field.type == FieldDescriptor.TYPE_STRING:
        return mutate((old or "").encode(), source, others).decode("utf-8", "replace")
    if field.type == FieldDescriptor.TYPE_BOOL:
        return not old
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return source.choice((0.0, -1.0, 1e-300, 1e30, float("inf"), float("nan")))
    if field.type in (FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_FIXED64):
        return source.choice((*LARGE_NUMBERS, (old or 0) + 1))
    if field.type == FieldDescriptor.TYPE_ENUM:
        return source.choice((0, 1, 2, 3, 4, 5, 77))
    return source.choice((*NUMBERS, (old or 0) + 1)) % (1 << 32)
