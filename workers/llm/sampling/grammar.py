"""Grammars: the tokens that may come next, by xgrammar.

preprocess has compiled the grammar; here it is read back and followed, token by token. While a grammar is
not complete, no token ends the request, and once it is complete and nothing may follow, only such a token
may come. Where none may come then (`ignore_eos`, `min_tokens`), the request is over without one.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.wire.errors import RequestError
from pipeline.wire.sampling import SamplingParams
from workers.grammars.binding import load_binding
from workers.grammars.compiled import unpack
from workers.grammars.vocabulary import MASK_BITS, GrammarVocabulary
from workers.llm.sampling.matching import Mask
from workers.llm.sampling.tokens import TokensSoFar

MAX_KEPT_BYTES = 96 << 20  # of grammars, as xgrammar counts them: in memory two to three times as much
SLOW_S = 0.05  # of processor time to follow a token, or to make a mask
MAX_SLOW = 8  # times of one request: it holds up all others


class GrammarRule:
    """Keeps the grammars used last, by their content. For one thread at a time."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self._vocabulary = vocabulary
        self._kept: OrderedDict[bytes, Any] = OrderedDict()  # the least recently used first
        self.num_kept_bytes = 0

    def load(self) -> None:
        """Reads the vocabulary, which takes a part of a second at the first time."""
        self._vocabulary.tokenizer_info()

    def is_asked(self, params: SamplingParams) -> bool:
        return params.grammar is not None

    def start(
        self, params: SamplingParams, tokens: TokensSoFar, compiled: bytes | memoryview
    ) -> GrammarMatcher:
        assert params.grammar is not None
        matcher = GrammarMatcher(self._find(params.grammar.digest, compiled), params, self._vocabulary)
        if not matcher.follow(tokens.output.tolist()):
            raise RequestError("output_token_ids do not keep to the grammar", field="choices")
        if matcher.is_over:
            raise RequestError("the grammar allows no further token", field="choices")
        return matcher

    def _find(self, digest: bytes, compiled: bytes | memoryview) -> Any:
        found = self._kept.get(digest)
        if found is not None:
            self._kept.move_to_end(digest)
            return found
        found = self._kept[digest] = unpack(compiled, self._vocabulary.tokenizer_info())
        self.num_kept_bytes += found.memory_size_bytes()
        while self.num_kept_bytes > MAX_KEPT_BYTES and len(self._kept) > 1:
            self.num_kept_bytes -= self._kept.popitem(last=False)[1].memory_size_bytes()
        return found


class GrammarMatcher:
    def __init__(
        self,
        compiled: Any,
        params: SamplingParams,
        vocabulary: GrammarVocabulary,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        eos = {token for token in vocabulary.eos_token_ids if token < vocabulary.size}
        ends = eos | set(params.stop_token_ids)
        self._matcher = load_binding().GrammarMatcher(compiled, sorted(ends), False, -1, None)
        self._grammar, self._min_tokens, self._clock = params.grammar, params.min_tokens, clock
        # What else forbids tokens: together they may leave none, and then any is chosen.
        forbidding = {
            "allowed_token_ids": params.allowed_token_ids is not None,
            "bad_words": bool(params.banned_token_ids),
            "thinking_budget": params.thinking_budget is not None,
        }
        self._others = [name for name, is_given in forbidding.items() if is_given]
        # Allowed only where the grammar is complete, even if one is a word of the grammar.
        self._ends = np.array(sorted(ends), dtype=np.int64)
        # The ends that do end this request.
        self._heeded = np.array(sorted(params.stop_token_ids if params.ignore_eos else ends), dtype=np.int64)
        self._num_tokens = self._num_slow = 0
        self._num_bytes = -(-vocabulary.size // 8)
        self._words = np.zeros((1, -(-vocabulary.size // MASK_BITS)), dtype=np.int32)
        self._mask: Mask | None = None  # of the next token, once it is known

    def follow(self, token_ids: Sequence[int]) -> bool:
        """Whether the grammar allows these tokens next."""
        self._mask = None
        for token_id in token_ids:
            started_at = self._clock()
            if not self._matcher.accept_token(token_id, False):
                return False
            self._num_tokens += 1
            # In an ambiguous grammar each token may take longer than the one before.
            self._watch(self._clock() - started_at)
        return True

    def accept(self, token_ids: Sequence[int]) -> None:
        if not self.follow(token_ids):
            if self._others:
                raise self._error(f"no token keeps to the grammar and to {' and '.join(self._others)}", 400)
            raise self._error("a token was chosen that the grammar does not allow", 500)

    @property
    def is_over(self) -> bool:
        if self._matcher.is_terminated():
            return True
        may_end = self._num_tokens >= self._min_tokens and len(self._heeded) > 0
        return not may_end and bool(self._matcher.is_completed()) and not self._next().any()

    def allowed(self) -> Mask:
        mask = self._next()
        if not mask.any():
            raise self._error("no token that may come next keeps to the grammar: see stop_token_ids", 400)
        return mask

    def allowed_behind(self, drafts: Sequence[int]) -> list[Mask]:
        masks: list[Mask] = []
        num_taken = 0
        # Where tokens take long, guesses are not worth their time.
        for token_id in drafts if not self._num_slow else ():
            if token_id in self._ends or not self._matcher.accept_token(token_id, False):
                break
            num_taken += 1
            if self._matcher.is_terminated():
                break
            mask = self._mask_behind(self._num_tokens + num_taken)
            if not mask.any():
                break
            masks.append(mask)
        if num_taken:
            self._matcher.rollback(num_taken)
        return masks

    def _next(self) -> Mask:
        if self._mask is None:
            started_at = self._clock()
            self._mask = self._mask_behind(self._num_tokens)
            self._watch(self._clock() - started_at)
        return self._mask

    def _mask_behind(self, num_tokens: int) -> Mask:
        """The tokens that may come behind the first `num_tokens`, which the matcher has accepted."""
        if not self._matcher.fill_next_token_bitmask(self._words, 0, False):
            self._words.fill(-1)  # all are allowed
        mask: Mask = self._words.view(np.uint8)[0, : self._num_bytes].copy()
        _set(mask, self._ends, False)  # xgrammar lets some through that are words of the grammar
        if num_tokens >= self._min_tokens and self._matcher.is_completed():
            _set(mask, self._heeded, True)
        return mask

    def _watch(self, seconds: float) -> None:
        self._num_slow += seconds > SLOW_S
        if self._num_slow >= MAX_SLOW:
            raise self._error(f"the grammar takes more than {SLOW_S * 1000:g} ms for a token", 400)

    def _error(self, message: str, status: int) -> RequestError:
        assert self._grammar is not None
        return RequestError(message, field=self._grammar.field, status=status)


def _set(mask: Mask, token_ids: npt.NDArray[np.int64], value: bool) -> None:
    bits = (1 << (token_ids % 8)).astype(np.uint8)
    if value:
        np.bitwise_or.at(mask, token_ids // 8, bits)
    else:
        np.bitwise_and.at(mask, token_ids // 8, ~bits)
