"""Decodes a request's JSON body into a struct."""

from __future__ import annotations

import json
import re
from typing import TypeVar

import msgspec

from pipeline.wire.errors import RequestError

# Signs between values. A body with more is refused before decoding, which would block the event loop. A text
# with so many is longer than any context; pictures in base64 have none.
MAX_SIGNS = {b"{": 1 << 17, b"[": 1 << 17, b",": 1 << 18}
# Numbers with an exponent: the decoder takes up to 15 us for each, and blocks the event loop meanwhile.
MAX_EXPONENTS = 1 << 12
MAX_QUOTES = 1 << 21  # a valid body has fewer: there is one of `MAX_SIGNS` to every two strings
Body = TypeVar("Body", bound=msgspec.Struct)


def decode_json(body: bytes | bytearray, kind: type[Body]) -> Body:
    """Raises RequestError, naming the field, for a body that does not fit `kind`."""
    for sign, limit in MAX_SIGNS.items():
        if (count := body.count(sign)) > limit:
            raise RequestError(f"the body has {count} times {sign.decode()!r}, the limit is {limit}")
    # A comma stands between two numbers: few commas are few numbers.
    if body.count(b",") >= MAX_EXPONENTS and _num_exponents(body) > MAX_EXPONENTS:
        raise RequestError(f"the body has more numbers with an exponent than the limit, {MAX_EXPONENTS}")
    try:
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.ValidationError:
            raise
        except (msgspec.DecodeError, UnicodeDecodeError):
            # Python clients write NaN, Infinity and lone surrogates. Python's decoder accepts them, so that
            # checks can name their field.
            request = msgspec.convert(json.loads(body), kind)
            _refuse_lone_surrogates(request)
            return request
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        missing = re.search(r"(?:missing required|contains unknown) field `([^`]+)`", message)
        parts = [path.rstrip("`").removeprefix("$").removeprefix("."), missing.group(1) if missing else ""]
        field = ".".join(part for part in parts if part)
        raise RequestError(f"{message}{f' in {field}' if field else ''}", field=field) from None
    except (ValueError, RecursionError, OverflowError):
        raise RequestError("the body is not valid JSON, or nested too deep") from None


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
