"""Records to bytes and back: msgpack of plain data, validated on the way in. No code crosses (invariant 9).

Floats are IEEE doubles, so a value survives bit for bit, NaN and infinities included (a statistic that is not finite
must reach the scorer, which fails it by name).
"""

from typing import TypeVar, cast

import msgpack  # pyright: ignore[reportMissingTypeStubs]
from pydantic import ValidationError

from services.records import Failure, Group, Prompt, Record
from services.stream.errors import CodecError

R = TypeVar("R", bound=Record)

MAX_BYTES = 512 * 1024 * 1024
"""Redis's own bound on a value."""


def encode(record: Record) -> bytes:
    packed = cast(bytes, msgpack.packb(record.model_dump(), use_bin_type=True))  # pyright: ignore[reportUnknownMemberType]
    if len(packed) > MAX_BYTES:
        raise CodecError(
            f"a {type(record).__name__} of {len(packed)} bytes is larger than {MAX_BYTES}; keep maps in files"
        )
    return packed


def decode(kind: type[R], data: bytes) -> R:
    """Raises CodecError for anything that is not a `kind` of this schema version."""
    try:
        plain: object = msgpack.unpackb(data, raw=False, use_list=False)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return kind.model_validate(plain)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CodecError(f"not a {kind.__name__}: {where}: {first['msg']}") from error
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise CodecError(f"{len(data)} bytes are not msgpack of a {kind.__name__}: {error}") from error


def encode_group(group: Group) -> bytes:
    return encode(group)


def decode_group(data: bytes) -> Group:
    return decode(Group, data)


def encode_prompt(prompt: Prompt) -> bytes:
    return encode(prompt)


def decode_prompt(data: bytes) -> Prompt:
    return decode(Prompt, data)


def failure_from_json(data: bytes) -> Failure:
    try:
        return Failure.model_validate_json(data)
    except ValidationError as error:
        raise CodecError(f"not a Failure: {error.error_count()} errors in {len(data)} bytes") from error
