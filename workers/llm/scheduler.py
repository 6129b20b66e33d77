"""Decides which requests compute how many tokens in the next step. Pure: no torch, no sockets, no clock.

Continuous batching: a request is ready up to the first placeholder whose embedding has not arrived, and
`step_budget.py` divides the step among the ready requests.

A request is admitted, in the order of `admission.py`, when the cache has room for its prompt. Blocks for its
output are allocated as it grows. When none are left, the youngest request of the heaviest tenant is preempted
and recomputed later (as in vLLM): by then its published blocks often are still cached.

    schedule() → the step runs → schedule() of the next, if they overlap → update() → …

With a drafter a decode may carry guesses of its next tokens (`speculation/`). They take only what nobody else
needs: free blocks, and free tokens of the step.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from pipeline.process.quarantine import nobody
from pipeline.wire.sampling import FinishReason
from workers.llm.admission import in_line, who_gives_blocks, who_makes_room, whom_to_preempt
from workers.llm.cache.manager import CacheManager
from workers.llm.prefixes import Prefixes, Save
from workers.llm.request import Request
from workers.llm.speculation.drafter import Drafter
from workers.llm.step_budget import Part, StepBudget
from workers.llm.step_times import StepTimes


class Scheduled(NamedTuple):
    """Tokens [start, stop) of a request, and guesses of the tokens behind them."""

    request: Request
    start: int
    stop: int
    is_sampled: bool  # the step computes the request's newest token, and so yields the next one
    drafts: Sequence[int] = ()
    saves: Sequence[Save] = ()  # of states inside this part, behind it, or behind one of its drafts
    num_guesses: int = 0  # of the tokens behind the step, to be made by the runner

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start + len(self.drafts)

    @property
    def is_plain_decode(self) -> bool:
        is_behind_prompt = self.start >= len(self.request.prompt_token_ids)
        is_plain = self.num_tokens == 1 and not self.saves and not self.num_guesses
        return self.is_sampled and is_plain and is_behind_prompt


class Admitted(NamedTuple):
    """A request that runs from now on, with its first `num_cached_tokens` from the prefix cache."""

    request: Request
    num_cached_tokens: int
    snapshot: int = -1  # of the states behind them


class Schedule(NamedTuple):
    scheduled: list[Scheduled]
    admitted: list[Admitted]
    preempted: list[Request]  # their leases are to be released once no in-flight step reads them
    num_decodes: int  # the first ones of `scheduled`
    is_alone: bool = False  # no other step may be in flight meanwhile


class Scheduler:
    """Runs as many requests at once as the cache has slots.

    `runs_alone` says whether a request is quarantined because a rank died while executing it: no other
    request is in its steps until it has yielded a token. With a `drafter` steps must not overlap: a guess
    needs all tokens before it.
    """

    def __init__(
        self, cache: CacheManager, max_num_batched_tokens: int, eos_token_ids: tuple[int, ...],
        step_times: StepTimes | None = None, has_prefix_cache: bool = True,
        runs_alone: Callable[[str], bool] = nobody, drafter: Drafter | None = None, prefill_multiple: int = 1,
        turn_start_id: int | None = None,
    ) -> None:  # fmt: skip
        self.cache, self.max_num_seqs = cache, cache.slots.num_slots
        self.budget = StepBudget(max_num_batched_tokens, step_times, prefill_multiple)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.prefixes = Prefixes(cache, has_prefix_cache, prefill_multiple, turn_start_id)
        self._runs_alone, self.drafter = runs_alone, drafter
        self.waiting: list[Request] = []  # by arrival
        self.running: list[Request] = []  # in order
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        self.prefixes.prepare(request)
        insort(self.waiting, request, key=_arrival)

    def remove(self, request: Request) -> None:
        """Ends a waiting or running request and frees its blocks."""
        request.is_over = True
        if request in self.running:
            self._stop(request)
        else:
            self.waiting.remove(request)
        if self.drafter is not None:
            self.drafter.forget(request)

    def _stop(self, request: Request) -> None:
        self.running.remove(request)
        self.cache.free(request.key)
        self.prefixes.stop(request)

    @property
    def num_pictures_unanswered(self) -> int:
        """Requests with pictures or videos whose first new token has not come."""
        queues = (self.waiting, self.running)
        return sum(bool(one.items) and not one.has_progress for queue in queues for one in queue)

    # What the next step computes.

    def schedule(self) -> Schedule:
        preempted = self._make_room()
        admitted: list[Admitted] = []
        if not preempted:  # else a preempted request would be readmitted and take its blocks back
            preempted = self._share_out()
            admitted = self._admit(preempted)
        ready: list[Part] = []
        short: list[Part] = []  # computed beside others only
        for request in self.running:
            num_ready_tokens = request.num_ready_tokens()
            num_ready = num_ready_tokens - request.num_computed_tokens
            if num_ready <= 0 or request.is_last_token_pending:
                continue
            is_alone = not request.has_progress and self._runs_alone(request.request_id)
            if request.is_short_text(num_ready_tokens):
                if not is_alone:
                    short.append((request, num_ready))
            elif is_alone:
                alone = self._take(request, min(self.budget.max_num_batched_tokens, num_ready))
                return Schedule([alone], admitted, preempted, 0, is_alone=True)
            else:
                ready.append((request, num_ready))
        parts, num_decodes = self.budget.divide([*ready, *short] if ready else ())
        drafts = self._draft(parts, num_decodes)
        asked = self._ask(parts, drafts)
        scheduled = [
            self._take(*part, drafts.get(part[0].key, ()), asked.get(part[0].key, 0)) for part in parts
        ]
        if drafts:  # decodes without drafts stay the first
            scheduled[:num_decodes] = sorted(scheduled[:num_decodes], key=lambda item: bool(item.drafts))
        return Schedule(scheduled, admitted, preempted, num_decodes)

    def _take(
        self, request: Request, num_tokens: int, drafts: Sequence[int] = (), num_guesses: int = 0
    ) -> Scheduled:
        start = request.num_computed_tokens
        stop = request.num_computed_tokens = start + num_tokens
        is_sampled = stop == request.num_tokens
        request.num_pending_tokens += is_sampled
        saves = self.prefixes.reserve(request, start, stop, len(drafts))
        return Scheduled(request, start, stop, is_sampled, drafts, saves, num_guesses)

    def _draft(self, parts: Sequence[Part], num_decodes: int) -> dict[tuple[str, int], Sequence[int]]:
        """Guesses for the decodes, which are the first of `parts`, by a request's key."""
        if self.drafter is None:
            return {}
        num_free_tokens = self.budget.max_num_batched_tokens - sum(num_tokens for _, num_tokens in parts)
        decodes = [request for request, _ in parts[:num_decodes]]
        return self.drafter.propose(decodes, num_free_tokens, self.cache, num_spare=len(self.running))

    def _ask(
        self, parts: Sequence[Part], drafts: Mapping[tuple[str, int], Sequence[int]]
    ) -> dict[tuple[str, int], int]:
        """How many tokens the runner is to guess behind the step, by a request's key."""
        if self.drafter is None:
            return {}
        sampled = [each for each, num_tokens in parts if num_tokens == each.num_remaining_tokens]
        return self.drafter.ask(sampled, drafts, self.cache, num_spare=len(self.running))

    def _make_room(self) -> list[Request]:
        """Extends block tables to hold every running request's newest token. Returns preempted requests."""
        preempted: list[Request] = []
        block_size = self.cache.block_size
        growing = [each for each in self.running if each.num_tokens > len(each.block_table) * block_size]
        for request in growing:
            while request.slot >= 0 and not self.cache.extend(request.key, request.num_tokens):
                preempted.append(whom_to_preempt(self.running))
                self._preempt(preempted[-1])
        return preempted

    def _share_out(self) -> list[Request]:
        """Makes room for the first waiting request that may start, if its tenant is below its share. Returns
        the requests preempted for it.
        """
        if not self.waiting:
            return []
        num_tenants = len({request.tenant for queue in (self.waiting, self.running) for request in queue})
        if num_tenants < 2:
            return []
        line = in_line(self.waiting, self.running)
        first = next((request for request in line if self._may_start(request)), None)
        if first is None:
            return []
        preempted: list[Request] = []
        if len(self.running) == self.max_num_seqs:
            victim = who_makes_room(first, self.running, num_tenants, self.max_num_seqs)
            if victim is None:
                return []
            preempted.append(victim)
            self._preempt(victim)
        found = self.cache.find(self.prefixes.hashes(first))
        num_blocks = -(-first.num_tokens // self.cache.block_size)
        while not self.cache.has_room(found, first.num_tokens, num_spare=len(self.running)):
            victim = who_gives_blocks(
                first,
                num_blocks,
                self.running,
                num_tenants,
                self.cache.blocks.num_blocks,
            )
            if victim is None:
                break
            preempted.append(victim)
            self._preempt(victim)
        return preempted

    def _preempt(self, request: Request) -> None:
        self._stop(request)
        request.start_over()
        if any(other.priority < request.priority for other in self.running):
            request.num_overtaken += 1
        self.add(request)
        self.num_preemptions += 1

    def _may_start(self, request: Request) -> bool:
        """False for a request that, once admitted, would wait while it holds what other requests need."""
        if request.is_held:
            return False
        hashes = self.prefixes.hashes(request)
        num_found = len(self.cache.find(hashes))
        # Only the oldest request is sure to get its next pool slot for an embedding. A request that was
        # admitted early and then waits for a pool slot could deadlock with the requests that it overtook. So
        # it overtakes only with all its embeddings.
        num_cached_tokens = num_found * self.cache.block_size
        if request.arrival > self.waiting[0].arrival and request.is_waiting_for_embeddings(num_cached_tokens):
            return False
        return not self.prefixes.is_awaited(hashes, num_found)

    def _admit(self, barred: Sequence[Request]) -> list[Admitted]:
        """`barred`: requests that were just preempted to make room, and so are not admitted."""
        admitted: list[Admitted] = []
        if not self.waiting or len(self.running) == self.max_num_seqs:
            return admitted
        for request in in_line([request for request in self.waiting if request not in barred], self.running):
            if len(self.running) == self.max_num_seqs:
                break
            if not self._may_start(request):
                continue
            hashes = self.prefixes.hashes(request)
            found = self.cache.find(hashes)
            # A spare block for each running request, or the newcomer would soon be preempted again.
            if not self.cache.has_room(found, request.num_tokens, num_spare=len(self.running)):
                break  # no later request overtakes this one
            assert not request.num_pending_tokens, "a token of the request is still in flight"
            snapshot = self.prefixes.use_snapshots(hashes[: len(found)])
            self.waiting.remove(request)
            request.slot, request.block_table = self.cache.allocate(
                request.key,
                found,
                request.num_tokens,
            )
            request.num_computed_tokens = len(found) * self.cache.block_size
            request.num_published_blocks = len(found)
            if not request.was_admitted:
                request.was_admitted = True
                request.num_cached_tokens = min(request.num_computed_tokens, len(request.prompt_token_ids))
            self.prefixes.start(request, hashes, len(found))
            insort(self.running, request, key=_order)
            admitted.append(Admitted(request, request.num_computed_tokens, snapshot))
        return admitted

    # The results of a step.

    def update(
        self,
        scheduled: Sequence[Scheduled],
        new_token_ids: Mapping[tuple[str, int], Sequence[int]],
        guesses: Mapping[tuple[str, int], Sequence[int]] = MappingProxyType({}),
    ) -> list[Request]:
        """Takes a step's results: the new tokens of each sampled request, in order, by its key. `guesses`:
        those of the tokens behind, where the runner was asked for any.

        Returns the finished requests, with their finish reason set and their blocks freed. Tokens of a
        request that ended while the step ran are dropped. A request preempted meanwhile gets its tokens.
        """
        finished: list[Request] = []
        for item in scheduled:
            request = item.request
            if request.is_over:
                self.prefixes.release(item.saves)
                continue
            # A preempted request has lost the blocks that the step wrote.
            is_kept = request.num_computed_tokens >= item.stop
            num_known = item.stop
            if item.is_sampled:
                request.num_pending_tokens -= 1
                num_known += self._accept(item, new_token_ids[request.key]) if item.drafts else 0
                self._append(request, new_token_ids[request.key])
            if is_kept:
                self.prefixes.publish_blocks(request, num_known)
            self.prefixes.publish_snapshots(request, item.saves, num_known)
            if request.finish_reason is not None:
                self.remove(request)
                finished.append(request)
            elif self.drafter is not None and request.key in guesses:
                self.drafter.tell(request, guesses[request.key])
        return finished

    def _accept(self, item: Scheduled, token_ids: Sequence[int]) -> int:
        """Counts the drafts that were right, whose keys and values are in the cache. Those of wrong ones will
        be overwritten."""
        num_accepted = len(token_ids) - 1
        item.request.num_computed_tokens += num_accepted
        assert self.drafter is not None
        self.drafter.observe(item.request, len(item.drafts), num_accepted)
        return num_accepted

    def _append(self, request: Request, token_ids: Sequence[int]) -> None:
        """Appends tokens up to the one that ends the request, and drops the rest."""
        for token_id in token_ids:
            request.output_token_ids.append(token_id)
            request.finish_reason = self._finish_reason(request, token_id)
            if request.finish_reason is not None:
                return

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        sampling = request.sampling
        is_eos = token_id in self.eos_token_ids and not sampling.ignore_eos
        if is_eos or token_id in sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(request.output_token_ids) >= request.max_tokens else None

    def check_integrity(self) -> None:
        self.cache.check_integrity()
        slots = {request.slot for request in self.running}
        num_taken = self.max_num_seqs - self.cache.slots.num_free
        assert len(slots) == len(self.running) == num_taken, "a slot is lost or used twice"
        self.prefixes.check_integrity(self.running)
        for queue, key in ((self.waiting, _arrival), (self.running, _order)):
            assert queue == sorted(queue, key=key), "a queue is out of order"


def _order(request: Request) -> tuple[int, int]:
    return request.order


def _arrival(request: Request) -> tuple[int, int]:
    return 0, request.arrival
