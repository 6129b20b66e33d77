"""The texts of a model's tokens, for grammars: the same in preprocess, which compiles, and in rank 0."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from workers.grammars.binding import load_binding

BYTE_LEVEL = 2  # xgrammar's number for BPE that writes each byte as a printable character
MASK_BITS = 32  # of a word of xgrammar's masks


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Model(msgspec.Struct):
    vocab: dict[str, int]


class _TokenizerFile(msgspec.Struct):
    model: _Model
    added_tokens: list[_AddedToken] = []


class GrammarVocabulary(NamedTuple):
    """`size` is that of the logits, which may be larger than the tokenizer's."""

    folder: Path  # with tokenizer.json
    size: int
    eos_token_ids: Sequence[int]

    def texts(self) -> list[str]:
        """The text of each token as the tokenizer's file writes it.

        Empty for special tokens and padding, which no grammar allows: a client never sees a special token's
        text, so it can be no part of an answer.
        """
        content = (self.folder / "tokenizer.json").read_bytes()
        found = msgspec.json.decode(content, type=_TokenizerFile)
        texts = [""] * self.size
        for text, token_id in found.model.vocab.items():
            if token_id < self.size:
                texts[token_id] = text
        for token in found.added_tokens:
            if token.id < self.size:
                texts[token.id] = "" if token.special else token.content
        return texts

    def tokenizer_info(self) -> Any:
        """xgrammar's `TokenizerInfo`. Takes 0.2 s for 150,000 tokens."""
        return _tokenizer_info(self.folder, self.size, tuple(self.eos_token_ids))


@functools.lru_cache(maxsize=2)  # as large as the vocabulary
def _tokenizer_info(folder: Path, size: int, eos_token_ids: tuple[int, ...]) -> Any:
    texts = GrammarVocabulary(folder, size, eos_token_ids).texts()
    return load_binding().TokenizerInfo(texts, BYTE_LEVEL, size, list(eos_token_ids), False)
