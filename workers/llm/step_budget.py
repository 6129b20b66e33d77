"""Divides a step's tokens among the ready requests. Pure: no torch, no sockets, no clock.

Decodes first, then prefills, cut to what is left: tenants in turn, each tenant's requests by arrival. While
streams decode, prefill gets the tokens that are nearly free by `StepTimes`, and a tenant that has had more
time than others waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from pipeline.transport.fair import Turns
from workers.llm.request import Request
from workers.llm.step_times import StepTimes
from workers.llm.time_shares import TimeShares

# A request and a number of its tokens. A plain tuple, as one is made for each request in each step.
Part = tuple[Request, int]


class StepBudget:
    """Remembers the tokens and the time that each tenant has had; no time without `step_times`.

    A part of a prefill ends at a multiple of `prefill_multiple` tokens of its sequence, or where nothing more
    is ready, or where the step is full before the next multiple.
    """

    def __init__(
        self, max_num_batched_tokens: int, step_times: StepTimes | None, prefill_multiple: int = 1
    ) -> None:
        self.max_num_batched_tokens, self.step_times = max_num_batched_tokens, step_times
        self._prefill_multiple = prefill_multiple
        # The next step is for decodes alone: what it leaves of the streams' stretch is for the ViTs.
        self.is_prefill_deferred = False
        self.stretch: float | None = None  # of the next step by its prefills; None: that of `step_times`
        self.has_prefill = False  # as of the last step: prompts were ready, deferred or not
        self._turns: Turns[str] = Turns()  # of tenants, by tokens of their prompts
        self._shares = TimeShares()

    def divide(self, ready: Sequence[Part]) -> tuple[list[Part], int]:
        """The parts of `ready` that the step computes, decodes first, and the number of decodes."""
        decodes: list[Part] = []
        prefills: list[Part] = []
        for part in self._of_tenants_behind(ready):
            request, num_tokens = part
            if num_tokens == 1 and request.num_remaining_tokens == 1:
                decodes.append(part)
            else:
                prefills.append(part)
        self.has_prefill = bool(prefills)
        chosen = decodes[: self.max_num_batched_tokens]
        num_decodes = len(chosen)
        budget = self.max_num_batched_tokens - num_decodes
        prefills = self._in_turn(prefills)
        if decodes and prefills and self.step_times is not None:
            shares = [(num_tokens, request.num_computed_tokens) for request, num_tokens in prefills]
            free = 0
            if not self.is_prefill_deferred:
                free = self.step_times.num_free_tokens(len(decodes), shares, self.stretch)
            budget = min(budget, free)
        for request, num_tokens in prefills:
            if budget <= 0:
                break
            num_taken = self._cut(request, min(budget, num_tokens), num_tokens)
            chosen.append((request, num_taken))
            budget -= num_taken
            self._turns.charge(request.tenant, num_taken)
        self._charge(chosen)
        return chosen, num_decodes

    def _cut(self, request: Request, num_taken: int, num_ready: int) -> int:
        over = (request.num_computed_tokens + num_taken) % self._prefill_multiple
        return num_taken - over if num_taken < num_ready and over < num_taken else num_taken

    def _of_tenants_behind(self, ready: Sequence[Part]) -> Sequence[Part]:
        """The parts of all tenants, or only of those that have had less time than others."""
        if self.step_times is None:
            return ready
        chosen = self._shares.choose(_tokens_by_tenant(ready), self._seconds)
        return [part for part in ready if part[0].tenant in chosen]

    def _in_turn(self, prefills: list[Part]) -> list[Part]:
        prefills.sort(key=lambda prefill: prefill[0].arrival)
        places = self._turns.arrange([(request.tenant, num_tokens) for request, num_tokens in prefills])
        return [prefills[place] for place in places]

    def _charge(self, chosen: Sequence[Part]) -> None:
        if self.step_times is not None and chosen:
            num_tokens = _tokens_by_tenant(chosen)
            self._shares.charge(num_tokens, self._seconds(num_tokens.total()))

    def _seconds(self, num_tokens: int) -> float:
        assert self.step_times is not None
        return self.step_times.predict(min(num_tokens, self.max_num_batched_tokens))


def _tokens_by_tenant(parts: Iterable[Part]) -> Counter[str]:
    num_tokens: Counter[str] = Counter()
    for request, count in parts:
        num_tokens[request.tenant] += count
    return num_tokens
