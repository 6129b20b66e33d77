"""From token ids to text, piece by piece: characters split over tokens, and stop strings split over pieces.

The text of a list of ids is not the concatenation of its ids' texts: `DecodeStream` holds ids back until a
character is complete. It decodes all held ids again with each new id, so their number is bounded here: 8000
special tokens in a row would take 3.6 s (0.5 ms each; text takes 2 us a token, this class included).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from pipeline.parsers.tags import overlap

MAX_PENDING = 16  # ids without text; no unfinished character has more


def tokenizer_hash(data: bytes) -> bytes:
    """Tells one tokenizer.json from another."""
    return hashlib.blake2b(data, digest_size=16).digest()


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes that one token stands for.

    Byte-level BPE writes each byte as a printable character (GPT-2, Radford et al. 2019).
    """
    token = tokenizer.id_to_token(token_id)
    if token is None:
        return b""
    if (
        all(character in _BYTES for character in token)
        and token_id not in tokenizer.get_added_tokens_decoder()
    ):
        return bytes(_BYTES[character] for character in token)
    return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """Printable bytes stand for themselves; the others take the code points from 256 on, in their order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


_BYTES = _byte_alphabet()


class Detokenizer:
    """One request's text, without special tokens unless they are asked for; but with those in `kept`, each by
    its id."""

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, kept: Mapping[int, str] | None = None
    ) -> None:
        self._kept = (kept or {}) if skip_special_tokens else {}
        self._tokenizer, self._skips_specials = tokenizer, skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._pending: list[int] = []  # ids that have added no text yet

    def add(self, token_ids: Iterable[int], is_last: bool = False) -> str:
        """The text that these ids add. An unfinished character is held back until complete or `is_last`."""
        shown: list[str] = []
        for token_id in token_ids:
            if token_id in self._kept:
                shown += (self._flush(), self._kept[token_id])
                continue
            self._pending.append(token_id)
            text = self._stream.step(self._tokenizer, token_id)
            if text is not None:
                self._pending.clear()
                shown.append(text)
            elif len(self._pending) > MAX_PENDING:
                shown.append(self._flush())
        if is_last:
            shown.append(self._flush())
        return "".join(shown)

    def _flush(self) -> str:
        """The text of the pending ids, an unfinished character as U+FFFD: `DecodeStream` never yields it."""
        text = self._tokenizer.decode(self._pending, skip_special_tokens=self._skips_specials)
        self._pending.clear()
        self._stream = DecodeStream(skip_special_tokens=self._skips_specials)
        return text


class StopStrings:
    """Holds back text that may become a stop string, and cuts the text at the first complete one, or with
    `is_included` behind it."""

    def __init__(self, stop: Sequence[str], is_included: bool = False) -> None:
        self._stop, self._is_included = stop, is_included
        self._held = ""
        self.hit: str | None = None  # the stop string that was met

    def add(self, text: str, is_last: bool = False) -> str:
        """The text that is certain to precede any stop string; empty after a hit."""
        if self.hit is not None:
            return ""
        if not self._stop:
            return text
        self._held += text
        found = [(place, stop) for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            place, self.hit = min(found)
            shown, self._held = self._held[: place + len(self.hit) * self._is_included], ""
            return shown
        keep = 0 if is_last else overlap(self._held, self._stop)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown
