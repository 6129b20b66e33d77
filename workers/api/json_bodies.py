"""Decodes a request's JSON body into a struct."""

from __future__ import annotations

import functools
import json
import re
import typing
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from pipeline.wire.errors import RequestError, shown

# Signs between values. A body with more is refused before decoding, which would block the event loop. A text
# with so many is longer than any context; pictures in base64 have none.
MAX_SIGNS = {b"{": 1 << 17, b"[": 1 << 17, b",": 1 << 18}
# Numbers with an exponent: the decoder takes up to 15 us for each, and blocks the event loop meanwhile.
MAX_EXPONENTS = 1 << 12
MAX_DEPTH = 256  # of values within values: what is made of a body, in whichever process, is encoded again
MAX_QUOTES = 1 << 21  # a valid body has fewer: there is one of `MAX_SIGNS` to every two strings
Body = TypeVar("Body", bound=msgspec.Struct)


class Decoded(NamedTuple, Generic[Body]):
    body: Body
    unknown: dict[str, Any]  # fields that `kind` does not have and that are set, by their path


def decode_json(body: bytes | bytearray, kind: type[Body]) -> Body:
    """As `decode_fields`, but raises RequestError for an unknown field that is set, too."""
    request, unknown = decode_fields(body, kind)
    for name in unknown:
        raise RequestError(f"unknown field {shown(name)}", field=name)
    return request


def decode_fields(body: bytes | bytearray, kind: type[Body]) -> Decoded[Body]:
    """Decodes as other servers do: null is a field left out, and 2.0 is 2 where an integer is meant.

    Raises RequestError, naming the field, for a body that does not fit `kind`.
    """
    _refuse_slow(body)
    try:
        value, is_repaired = _parse(body)
        _refuse_deep(body, value)
        if not isinstance(value, dict):
            raise RequestError(f"the body must be a JSON object, got {shown(value)}")
        unknown: dict[str, Any] = {}
        request = msgspec.convert(_simplified(value, kind, "", unknown), kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        missing = re.search(r"missing required field `([^`]+)`", message)
        parts = [path.rstrip("`").removeprefix("$").removeprefix("."), missing.group(1) if missing else ""]
        field = ".".join(part for part in parts if part)
        raise RequestError(f"{message}{f' in {field}' if field else ''}", field=field) from None
    except (ValueError, RecursionError, OverflowError):
        raise RequestError("the body is not valid JSON, or nested too deep") from None
    if is_repaired:
        _refuse_lone_surrogates(request)
    return Decoded(request, unknown)


def is_unset(value: object) -> bool:
    """Clients that serialise all their fields send null or empty brackets for those that nobody has set."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def _refuse_slow(body: bytes | bytearray) -> None:
    """Raises RequestError for a body that would take the decoder long."""
    for sign, limit in MAX_SIGNS.items():
        if (count := body.count(sign)) > limit:
            raise RequestError(f"the body has {count} times {sign.decode()!r}, the limit is {limit}")
    # A comma stands between two numbers: few commas are few numbers.
    if body.count(b",") >= MAX_EXPONENTS and _num_exponents(body) > MAX_EXPONENTS:
        raise RequestError(f"the body has more numbers with an exponent than the limit, {MAX_EXPONENTS}")


def _refuse_deep(body: bytes | bytearray, value: Any) -> None:
    """Raises RequestError for a value that Python's encoders could not write from within a deep stack."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise RequestError(f"the body is nested too deep: the limit is {MAX_DEPTH}")
        level = [child for one in level for child in (one.values() if isinstance(one, dict) else one)]


def _parse(body: bytes | bytearray) -> tuple[Any, bool]:
    """The value, and whether only Python's decoder accepts it: Python clients write NaN, Infinity and lone
    surrogates, which later checks refuse by the name of their field."""
    try:
        return msgspec.json.decode(body), False
    except (msgspec.DecodeError, UnicodeDecodeError):
        return json.loads(body), True


class FieldKind(NamedTuple):
    is_integer: bool  # and no other number, alone or in a list
    struct: type[msgspec.Struct] | None  # the field's type, or that of its items
    is_optional: bool


@functools.cache
def field_kinds(kind: type[msgspec.Struct]) -> dict[str, FieldKind]:
    return {field.encode_name: _kind_of(field) for field in msgspec.structs.fields(kind)}


def _kind_of(field: msgspec.structs.FieldInfo) -> FieldKind:
    types = [field.type]
    found: set[Any] = set()
    while types:
        one = types.pop()
        if inner := typing.get_args(one):
            types += inner
        else:
            found.add(one)
    structs = [one for one in found if isinstance(one, type) and issubclass(one, msgspec.Struct)]
    return FieldKind(int in found and float not in found, structs[0] if structs else None, not field.required)


def _simplified(
    given: dict[str, Any], kind: type[msgspec.Struct], path: str, unknown: dict[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """The known fields without those that are null; unknown ones that are set go to `unknown`."""
    kinds, found = field_kinds(kind), {}
    for name, value in given.items():
        known = kinds.get(name)
        if known is None:
            if not is_unset(value):
                unknown[f"{path}{name}"] = value
        elif value is not None or not known.is_optional:
            found[name] = _simplified_value(value, known, f"{path}{name}", unknown)
    return found


def _simplified_value(value: Any, kind: FieldKind, path: str, unknown: dict[str, Any]) -> Any:
    if isinstance(value, list) and (kind.struct or kind.is_integer):
        return [
            _simplified_value(item, kind, f"{path}[{index}]", unknown) for index, item in enumerate(value)
        ]
    if isinstance(value, dict) and kind.struct:
        return _simplified(value, kind.struct, f"{path}.", unknown)
    if isinstance(value, float) and kind.is_integer and value.is_integer():
        return int(value)
    return value


def _num_exponents(body: bytes | bytearray) -> int:
    """The number of letters `e` outside of strings: in exponents, and in `true` and `false`."""
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    outside = b"".join(plain.split(b'"', MAX_QUOTES)[::2])
    return outside.count(b"e") + outside.count(b"E")


def _refuse_lone_surrogates(request: msgspec.Struct) -> None:
    """Raises RequestError for half a character of a text that was cut: no encoder accepts it."""
    fields: dict[str, object] = {}
    for name in request.__struct_fields__:
        value = getattr(request, name)
        if isinstance(value, list) and value and isinstance(value[0], msgspec.Struct):
            fields |= {f"{name}[{index}]": item for index, item in enumerate(value)}
        else:
            fields[name] = value
    for field, value in fields.items():
        try:
            msgspec.json.encode(value)
        except UnicodeEncodeError:
            raise RequestError("half a character (a lone surrogate) is no text", field=field) from None
