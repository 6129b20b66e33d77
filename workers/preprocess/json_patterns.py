r"""Regular expressions over a string's characters, rewritten for how JSON spells the string.

xgrammar takes a `pattern` for the text between the quotes. It leaves out quotes, backslashes and control
characters, but where every string of the pattern has one: there it takes the pattern as it is, classes too,
and the answer would be no JSON. Here what must be escaped becomes its escape, and no class has it:

    ^C:\\\S+$  →  ^C:(?:\\\\)[^\s"\\\x00-\x1f]+$

Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

QUOTE, BACKSLASH, FIRST_PLAIN = ord('"'), ord("\\"), ord(" ")
_LETTERS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "0": 0}
_SHORT = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", QUOTE: '"', BACKSLASH: "\\\\"}
_ANYTHING = r"[\s\S]*"
_CODE = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\}")
_CONTROL = re.compile(r"c([A-Za-z])")
_ESCAPED = r'"\\\x00-\x1f'  # within a class
_BLANKS = r" \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_OPPOSITE = {"\\S": "\\s", "\\W": "\\w", "\\D": "\\d"}
# What stands for many characters, outside a class.
_WIDE = {".": f"[^{_ESCAPED}]", "\\s": f"[{_BLANKS}]"} | {
    name: f"[^{other}{_ESCAPED}]" for name, other in _OPPOSITE.items()
}


class _Piece(NamedTuple):
    """A character of a pattern, or an escape."""

    text: str
    code: int | None  # of the character that it means, if it is one


_END = _Piece("", None)


def in_json(pattern: str) -> str:
    """The pattern for what stands between the quotes."""
    written: list[str] = []
    pieces = _pieces(pattern)
    for piece in pieces:
        if piece.text == "[":
            written.append(_class(pieces))
        elif piece.code is not None and _is_escaped(piece.code):
            written.append(f"(?:{_escape(piece.code)})")
        else:
            written.append(_WIDE.get(piece.text, piece.text))
    return "".join(written)


def with_open_side(pattern: str) -> str:
    """The pattern for a whole string. Where one side alone is anchored, anything may stand at the other."""
    pieces = list(_pieces(pattern))
    if not pieces or _has_alternatives(pieces):
        return pattern
    is_anchored = pieces[0].text == "^", pieces[-1].text == "$"
    match is_anchored:
        case True, False:
            return f"{pattern}{_ANYTHING}"
        case False, True:
            return f"{_ANYTHING}{pattern}"
        case _:
            return pattern


def _has_alternatives(pieces: Iterable[_Piece]) -> bool:
    """Outside groups and classes."""
    depth, is_in_class = 0, False
    for piece in pieces:
        if is_in_class:
            is_in_class = piece.text != "]"
        elif piece.text == "[":
            is_in_class = True
        elif piece.text in "()":
            depth += 1 if piece.text == "(" else -1
        elif piece.text == "|" and depth == 0:
            return True
    return False


def _pieces(pattern: str) -> Iterator[_Piece]:
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if char != "\\" or at + 1 == len(pattern):
            yield _Piece(char, None if char == "\\" else ord(char))
            at += 1
            continue
        name = pattern[at + 1]
        if found := _CODE.match(pattern, at + 1):
            code: int | None = int(next(filter(None, found.groups())), 16)
        elif found := _CONTROL.match(pattern, at + 1):
            code = ord(found[1]) % 32
        else:
            code = _LETTERS.get(name, None if name.isalnum() else ord(name))
        stop = found.end() if found else at + 2
        yield _Piece(pattern[at:stop], code)
        at = stop


def _class(pieces: Iterator[_Piece]) -> str:
    """A class, whose opening bracket has been read."""
    members: list[_Piece] = []
    for piece in pieces:
        if piece.text == "]":
            break
        members.append(_Piece(piece.text, 8) if piece.text == "\\b" else piece)
    texts = [member.text for member in members]
    if texts[:1] == ["^"]:
        texts[-1] = _as_member(texts[-1])
        return f"[{''.join(texts)}{_ESCAPED}]"
    plain, wide = list[str](), list[str]()
    escaped: dict[int, None] = {}
    for first, last in _ranges(members):
        if first.text in _OPPOSITE and _OPPOSITE[first.text] in texts:
            return _WIDE["."]
        if first.text in _OPPOSITE:
            wide.append(_WIDE[first.text])
            continue
        if first.code is None or last.code is None:
            plain.append(_BLANKS if first.text == "\\s" else first.text)
            continue
        codes = [code for code in (*range(FIRST_PLAIN), QUOTE, BACKSLASH) if first.code <= code <= last.code]
        escaped.update(dict.fromkeys(codes))
        plain += _without(first, last, codes) if codes else [_text(first, last)]
    if escaped and not plain and not wide:  # beside a class xgrammar drops escapes
        return f"(?:{'|'.join(map(_escape, escaped))})"
    if plain or not wide:
        wide.append(f"[{''.join(plain)}]")
    return wide[0] if len(wide) == 1 else f"(?:{'|'.join(wide)})"


def _text(first: _Piece, last: _Piece) -> str:
    return _as_member(first.text) if first is last else f"{first.text}-{last.text}"


def _as_member(text: str) -> str:
    """So that it begins no range with what comes behind it."""
    return "\\-" if text == "-" else text


def _ranges(members: list[_Piece]) -> Iterator[tuple[_Piece, _Piece]]:
    at = 0
    while at < len(members):
        first = last = members[at]
        dash, stop, *_ = *members[at + 1 : at + 3], _END, _END
        if dash.text == "-" and first.code is not None and stop.code is not None:
            last = stop
            at += 2
        yield first, last
        at += 1


def _without(first: _Piece, last: _Piece, codes: Iterable[int]) -> Iterator[str]:
    """The parts of a range that are left without these codes, which are in it and in order."""
    assert first.code is not None
    assert last.code is not None
    start = first.code
    for code in (*codes, last.code + 1):
        if start < code:
            yield _shown(start) if start == code - 1 else f"{_shown(start)}-{_shown(code - 1)}"
        start = code + 1


def _shown(code: int) -> str:
    return f"\\u{code:04x}" if code <= 0xFFFF else chr(code)


def _is_escaped(code: int) -> bool:
    return code < FIRST_PLAIN or code in (QUOTE, BACKSLASH)


def _escape(code: int) -> str:
    """A pattern for JSON's escape of a character."""
    return "\\\\" + _SHORT.get(code, f"u{code:04x}")
