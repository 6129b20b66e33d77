"""From token ids to text, piece by piece: characters split over tokens, and stop strings split over pieces.

The text of a growing list of ids is not the sum of the texts of its ids. So a short window of recent ids is
decoded twice, without and with the new one, and what the second has more is new (the way of Hugging Face's
text-generation-inference).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

# ids without text that are waited with: more are no unfinished character, and decoding them again gets slow
MAX_PENDING = 16
REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to


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
    """Bytes that print stand for themselves; the others take the code points from 256 on, in their order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


_BYTES = _byte_alphabet()


class Detokenizer:
    """One request's text. Special tokens are left out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._window = 0  # ids before this are no longer needed to decode what follows
        self._told = 0  # ids before this have been turned into text

    def add(self, token_ids: Iterable[int], is_last: bool = False) -> str:
        """The text that these ids add. An unfinished character waits for its rest, or until `is_last`."""
        shown = []
        for token_id in token_ids:
            self._ids.append(token_id)
            shown.append(self._advance(len(self._ids) - self._told > MAX_PENDING))
        if is_last:
            shown.append(self._advance(True))
        return "".join(shown)

    def _advance(self, must_show: bool) -> str:
        before = self._decode(self._ids[self._window : self._told])
        after = self._decode(self._ids[self._window :])
        if (len(after) <= len(before) or after.endswith(REPLACEMENT)) and not must_show:
            return ""
        self._window, self._told = self._told, len(self._ids)
        return after[len(before) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)


class StopStrings:
    """Holds back text that may become a stop string, and cuts at the first one that is complete."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.is_hit = False

    def add(self, text: str, is_last: bool = False) -> str:
        """What may be shown. After a hit nothing more is."""
        if self.is_hit:
            return ""
        self._held += text
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.is_hit = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = 0 if is_last else max((self._overlap(stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def _overlap(self, stop: str) -> int:
        """Longest end of the held text with which `stop` begins."""
        longest = min(len(stop) - 1, len(self._held))
        return next((length for length in range(longest, 0, -1) if self._held.endswith(stop[:length])), 0)
