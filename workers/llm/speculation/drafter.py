"""Which decodes of a step get drafts, and how many. Pure: no torch, no clock, and no idea of how a draft is
made: a proposer guesses from the tokens alone, or tells what the runner has guessed behind the step before.

A step of few rows is bound by reading the weights, so that some more rows are nearly free. These are shared
among the requests that have a guess. A request whose guesses are wrong is left alone for ever longer.

    propose(decodes, …), ask(sampled, …) → the step runs → observe(request, …), tell(request, …)
    → propose(…) → … → forget(request)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from workers.llm.cache.manager import CacheManager
from workers.llm.request import Request
from workers.llm.sampling.matching import masks_behind
from workers.llm.speculation.proposer import Proposer
from workers.llm.speculation.told import ToldProposer

MAX_ROWS = 16  # of a step: decodes and drafts
MAX_MISSES = 3  # in a row; a request with more has to wait
MAX_TO_WAIT = 32  # decodes
# As vLLM names them.
COUNTED = {
    "spec_decode_num_drafts": "Decodes with guesses of the next tokens",
    "spec_decode_num_draft_tokens": "Guessed tokens",
    "spec_decode_num_accepted_tokens": "Guessed tokens that were right",
}


@dataclass(slots=True)
class _Drafted:
    """A request, as the drafter knows it."""

    proposer: Proposer
    num_known: int = 0  # tokens that the proposer has
    num_misses: int = 0  # proposals in a row of which no token was right
    num_to_wait: int = 0  # decodes without a proposal

    def propose(self, request: Request, num_tokens: int) -> Sequence[int]:
        if self.num_to_wait:
            self.num_to_wait -= 1
            return ()
        self.proposer.extend(request.token_ids(self.num_known, request.num_tokens))
        self.num_known = request.num_tokens
        return self.proposer.propose(num_tokens)

    def observe(self, num_accepted: int) -> None:
        self.num_misses = 0 if num_accepted else self.num_misses + 1
        if self.num_misses > MAX_MISSES:
            self.num_to_wait = min(1 << (self.num_misses - MAX_MISSES), MAX_TO_WAIT)


class Drafter:
    """`num_tokens`: the most drafts of one request in a step. `asks_runner`: who guesses is the runner, and
    the proposers are `ToldProposer`s."""

    def __init__(
        self,
        make_proposer: Callable[[], Proposer],
        num_tokens: int,
        max_rows: int = MAX_ROWS,
        asks_runner: bool = False,
    ) -> None:
        self._make_proposer, self._num_tokens, self._max_rows = make_proposer, num_tokens, max_rows
        self._asks_runner = asks_runner
        self._drafted: dict[tuple[str, int], _Drafted] = {}  # by the request's key
        self.counters = dict.fromkeys(COUNTED, 0)
        self.accepted_by_place = [0] * num_tokens  # the drafts that were right, by their place

    def propose(
        self, decodes: Sequence[Request], num_free_tokens: int, cache: CacheManager, num_spare: int
    ) -> dict[tuple[str, int], Sequence[int]]:
        """Drafts by a request's key, for some of the requests that decode next, with blocks for them.

        There are at most `num_free_tokens`, as the step has no more room, and at least `num_spare` blocks
        stay free: nobody is preempted for a guess.
        """
        room = min(self._max_rows - len(decodes), num_free_tokens)
        if room <= 0:
            return {}
        found = [(request, drafts) for request in decodes if (drafts := self._guess(request))]
        found.sort(key=lambda pair: len(pair[1]))
        shared: dict[tuple[str, int], Sequence[int]] = {}
        for place, (request, drafts) in enumerate(found):
            share = drafts[: room // (len(found) - place)]
            share = share[: _find_room(request, len(share), cache, num_spare)]
            if share and request.matchers:
                request.draft_masks = masks_behind(request.matchers, share)
                share = share[: len(request.draft_masks)]
            if share:
                shared[request.key] = share
                room -= len(share)
        return shared

    def _guess(self, request: Request) -> Sequence[int]:
        # The step yields one token more than it has drafts.
        num_wanted = min(self._num_tokens, request.max_tokens - len(request.output_token_ids) - 1)
        if num_wanted <= 0 or not request.output_token_ids:
            return ()
        return self._drafted_of(request).propose(request, num_wanted)

    def ask(
        self,
        sampled: Sequence[Request],
        drafts: Mapping[tuple[str, int], Sequence[int]],
        cache: CacheManager,
        num_spare: int,
    ) -> dict[tuple[str, int], int]:
        """How many tokens the runner is to guess behind the next step, by the key of the request: for those
        that this step samples, which have such drafts in it. So many as the step behind it can compute.

        To be called behind `propose`. A guess is made from the keys and values of those before it, so these
        get blocks, too, as far as any are free.
        """
        room = self._max_rows - len(sampled)
        if not self._asks_runner or room <= 0 or not sampled:
            return {}
        asked: dict[tuple[str, int], int] = {}
        for request in sampled:
            num_left = request.max_tokens - len(request.output_token_ids) - 2  # behind this step and the next
            num_wanted = min(self._num_tokens, -(-room // len(sampled)), num_left)
            if num_wanted > 0 and not self._drafted_of(request).num_to_wait:
                asked[request.key] = num_wanted
                num_behind = len(drafts.get(request.key, ())) + num_wanted - 1
                num_behind = min(num_behind, request.max_num_tokens - request.num_tokens)
                _find_room(request, num_behind, cache, num_spare)
        return asked

    def tell(self, request: Request, guesses: Sequence[int]) -> None:
        """The runner has guessed what comes behind the request's last token."""
        proposer = self._drafted_of(request).proposer
        assert isinstance(proposer, ToldProposer)
        proposer.tell(request.num_tokens, guesses)

    def _drafted_of(self, request: Request) -> _Drafted:
        if request.key not in self._drafted:
            self._drafted[request.key] = _Drafted(self._make_proposer())
        return self._drafted[request.key]

    def observe(self, request: Request, num_drafts: int, num_accepted: int) -> None:
        """A step has computed `num_drafts` of the request's drafts: so many of them were right."""
        self._drafted[request.key].observe(num_accepted)
        counts = 1, num_drafts, num_accepted
        for name, count in zip(COUNTED, counts, strict=True):
            self.counters[name] += count
        for place in range(num_accepted):
            self.accepted_by_place[place] += 1

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._drafted.pop(request.key, None)


def _find_room(request: Request, num_drafts: int, cache: CacheManager, num_spare: int) -> int:
    """How many drafts the request's blocks can hold, with further blocks for them as far as any are free."""
    num_held = len(request.block_table) * cache.block_size
    num_missing = request.num_tokens + num_drafts - num_held
    while num_missing > 0 and not cache.has_room([], num_missing, num_spare):
        num_missing -= cache.block_size
    if num_missing > 0:
        cache.extend(request.key, num_held + num_missing)
    return len(request.block_table) * cache.block_size - request.num_tokens
