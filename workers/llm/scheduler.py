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

import math
from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from pipeline.process.quarantine import nobody
from pipeline.wire.sampling import FinishReason
from workers.llm.admission import in_line, who_gives_blocks, who_makes_room, whom_to_preempt
from workers.llm.cache.boundaries import boundaries_of, last_place
from workers.llm.cache.manager import CacheManager
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
    snapshot: int = -1  # where the state behind `stop` is saved

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start + len(self.drafts)

    @property
    def is_plain_decode(self) -> bool:
        is_behind_prompt = self.start >= len(self.request.prompt_token_ids)
        return self.is_sampled and self.num_tokens == 1 and is_behind_prompt and self.snapshot < 0


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
        self.has_prefix_cache = has_prefix_cache
        self._runs_alone, self.drafter = runs_alone, drafter
        self.waiting: list[Request] = []  # by arrival
        self.running: list[Request] = []  # in order
        self.num_preemptions = 0
        # Hashes of blocks on their way into the cache; of layers with a state, those with a snapshot.
        self._computing: dict[bytes, Request] = {}
        self._turn_start_id = turn_start_id
        self._snapshot_multiple = math.lcm(prefill_multiple, cache.block_size)

    def add(self, request: Request) -> None:
        # Its choices share the prompt's blocks, no other request does.
        if not self.has_prefix_cache or request.sampling.prompt_logprobs is not None:
            request.cache_salt = f"{request.request_id}/{request.attempt}/".encode() + request.client_id
        if self.cache.snapshots is not None and self._keeps_states(request):
            request.boundaries = boundaries_of(
                request.prompt_token_ids, request.items, self._turn_start_id, self._snapshot_multiple,
                max_count=-(-self.cache.snapshots.num_places // 2),
            )  # fmt: skip
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
        for digest in [digest for digest, owner in self._computing.items() if owner is request]:
            del self._computing[digest]

    @property
    def num_without_token(self) -> int:
        """Requests whose first new token has not come."""
        return sum(not request.has_progress for queue in (self.waiting, self.running) for request in queue)

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
            num_ready = self._next_stop(request, num_ready_tokens) - request.num_computed_tokens
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
        scheduled = [self._take(*part, drafts.get(part[0].key, ())) for part in parts]
        if drafts:  # decodes without drafts stay the first
            scheduled[:num_decodes] = sorted(scheduled[:num_decodes], key=lambda item: bool(item.drafts))
        return Schedule(scheduled, admitted, preempted, num_decodes)

    def _take(self, request: Request, num_tokens: int, drafts: Sequence[int] = ()) -> Scheduled:
        start = request.num_computed_tokens
        stop = request.num_computed_tokens = start + num_tokens
        is_sampled = stop == request.num_tokens
        request.num_pending_tokens += is_sampled
        return Scheduled(request, start, stop, is_sampled, drafts, self._reserve_snapshot(request, stop))

    def _next_stop(self, request: Request, num_ready_tokens: int) -> int:
        """Where its next part ends at the latest."""
        boundary = request.next_boundary()
        return num_ready_tokens if boundary is None else min(num_ready_tokens, boundary.position)

    def _reserve_snapshot(self, request: Request, stop: int) -> int:
        """A place for the state behind `stop`; -1 where none is kept."""
        snapshots = self.cache.snapshots
        if snapshots is None or stop % self._snapshot_multiple or not self._keeps_states(request):
            return -1
        if stop <= len(request.prompt_token_ids):
            if request.boundary_at(stop) is None:
                return -1
            digest = self._hash_at(request, stop)
            if digest in snapshots:
                snapshots.use(digest)
                return -1
        elif not snapshots.has_free_place:  # rather its own than another's
            snapshots.forget(request.answer_snapshot)
        place = snapshots.reserve()
        return -1 if place is None else place

    def _hash_at(self, request: Request, stop: int) -> bytes:
        return request.block_hashes(stop // self.cache.block_size, self.cache.block_size)[-1]

    def _draft(self, parts: Sequence[Part], num_decodes: int) -> dict[tuple[str, int], Sequence[int]]:
        """Guesses for the decodes, which are the first of `parts`, by a request's key."""
        if self.drafter is None:
            return {}
        num_free_tokens = self.budget.max_num_batched_tokens - sum(num_tokens for _, num_tokens in parts)
        decodes = [request for request, _ in parts[:num_decodes]]
        return self.drafter.propose(decodes, num_free_tokens, self.cache, num_spare=len(self.running))

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
        found = self.cache.find(self._hashes(first))
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
        hashes = self._hashes(request)
        num_found = len(self.cache.find(hashes))
        # Only the oldest request is sure to get its next pool slot for an embedding. A request that was
        # admitted early and then waits for a pool slot could deadlock with the requests that it overtook. So
        # it overtakes only with all its embeddings.
        num_cached_tokens = num_found * self.cache.block_size
        if request.arrival > self.waiting[0].arrival and request.is_waiting_for_embeddings(num_cached_tokens):
            return False
        # Another request computes the next block of its prefix: it starts once that block is in the cache. A
        # state cannot go on from the next block, but from the next snapshot.
        stop = num_found + 1 if self.cache.snapshots is None else len(hashes)
        return not any(digest in self._computing for digest in hashes[num_found:stop])

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
            hashes = self._hashes(request)
            found = self.cache.find(hashes)
            # A spare block for each running request, or the newcomer would soon be preempted again.
            if not self.cache.has_room(found, request.num_tokens, num_spare=len(self.running)):
                break  # no later request overtakes this one
            assert not request.num_pending_tokens, "a token of the request is still in flight"
            snapshot = self._use_snapshots(hashes[: len(found)])
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
            self._computing.update(dict.fromkeys(self._hashes_to_come(request, hashes, len(found)), request))
            insort(self.running, request, key=_order)
            admitted.append(Admitted(request, request.num_computed_tokens, snapshot))
        return admitted

    def _hashes(self, request: Request) -> list[bytes]:
        """Hashes of the full blocks before the last token, which must be left to compute."""
        if not self._publishes(request):
            return []
        return request.block_hashes((request.num_tokens - 1) // self.cache.block_size, self.cache.block_size)

    def _use_snapshots(self, found: Sequence[bytes]) -> int:
        """The place of the snapshot behind the blocks that were found; -1: none. Those before it are in use,
        too: the shorter a prefix is, the more requests share it."""
        snapshots = self.cache.snapshots
        if snapshots is None:
            return -1
        places = [snapshots.use(digest) for digest in reversed(found) if digest in snapshots]
        return places[0] if places else -1

    def _hashes_to_come(self, request: Request, hashes: Sequence[bytes], num_found: int) -> Sequence[bytes]:
        """Those that other requests may wait for."""
        if self.cache.snapshots is None:
            return hashes[num_found:]
        counts = [boundary.position // self.cache.block_size for boundary in request.boundaries]
        return [hashes[count - 1] for count in counts if count > num_found]

    def num_shared_tokens(self, choices: Sequence[Request]) -> int:
        """Prompt tokens that a request's choices share: those in full blocks, which one choice computes."""
        if not choices or not self._publishes(choices[0]):
            return 0
        num_tokens, block_size = len(choices[0].prompt_token_ids), self.cache.block_size
        if self.cache.snapshots is None:
            return (num_tokens - 1) // block_size * block_size
        return last_place(num_tokens, self._snapshot_multiple)

    def _keeps_states(self, request: Request) -> bool:
        """Whether anybody can find them: a request for its prompt's log-probabilities shares with none but
        its own choices."""
        is_shared = request.sampling.prompt_logprobs is None or request.sampling.n > 1
        return is_shared and self._publishes(request)

    def _publishes(self, request: Request) -> bool:
        """Whether its blocks are published: for all requests, or for the other choices of its request."""
        return self.cache.has_prefixes and (self.has_prefix_cache or request.sampling.n > 1)

    # The results of a step.

    def update(
        self,
        scheduled: Sequence[Scheduled],
        new_token_ids: Mapping[tuple[str, int], Sequence[int]],
    ) -> list[Request]:
        """Takes a step's results: the new tokens of each sampled request, in order, by its key.

        Returns the finished requests, with their finish reason set and their blocks freed. Tokens of a
        request that ended while the step ran are dropped. A request preempted meanwhile gets its tokens.
        """
        finished: list[Request] = []
        for item in scheduled:
            request = item.request
            if request.is_over:
                self._release_snapshot(item)
                continue
            # A preempted request has lost the blocks that the step wrote.
            is_kept = request.num_computed_tokens >= item.stop
            num_known = item.stop
            if item.is_sampled:
                request.num_pending_tokens -= 1
                num_known += self._accept(item, new_token_ids[request.key]) if item.drafts else 0
                self._append(request, new_token_ids[request.key])
            num_full = min(num_known, request.num_tokens - 1) // self.cache.block_size
            if is_kept and num_full > request.num_published_blocks and self._publishes(request):
                self._publish(request, num_full)
            if item.snapshot >= 0:
                self._publish_snapshot(request, item)
            if request.finish_reason is not None:
                self.remove(request)
                finished.append(request)
        return finished

    def _release_snapshot(self, item: Scheduled) -> None:
        if item.snapshot >= 0:
            assert self.cache.snapshots is not None
            self.cache.snapshots.release(item.snapshot)

    def _publish_snapshot(self, request: Request, item: Scheduled) -> None:
        """Also that of a request that was preempted meanwhile: the copy was made. Behind its prompt a request
        has one snapshot, which moves along."""
        snapshots, digest = self.cache.snapshots, self._hash_at(request, item.stop)
        assert snapshots is not None
        boundary = request.boundary_at(item.stop)
        is_new = snapshots.publish(item.snapshot, digest, is_frame=boundary is not None and boundary.is_frame)
        if item.stop > len(request.prompt_token_ids) and request.answer_snapshot != digest:
            snapshots.forget(request.answer_snapshot)
            request.answer_snapshot = digest if is_new else b""  # else it is another's

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

    def _publish(self, request: Request, num_blocks: int) -> None:
        hashes = request.block_hashes(num_blocks, self.cache.block_size)
        for index in range(request.num_published_blocks, num_blocks):
            self.cache.publish(request.block_table[index], hashes[index])
            if self._computing.get(hashes[index]) is request:
                del self._computing[hashes[index]]
        request.num_published_blocks = num_blocks

    def check_integrity(self) -> None:
        self.cache.check_integrity()
        slots = {request.slot for request in self.running}
        num_taken = self.max_num_seqs - self.cache.slots.num_free
        assert len(slots) == len(self.running) == num_taken, "a slot is lost or used twice"
        is_awaited_from_nobody = any(request not in self.running for request in self._computing.values())
        assert not is_awaited_from_nobody, "blocks are awaited from nobody"
        for queue, key in ((self.waiting, _arrival), (self.running, _order)):
            assert queue == sorted(queue, key=key), "a queue is out of order"


def _order(request: Request) -> tuple[int, int]:
    return request.order


def _arrival(request: Request) -> tuple[int, int]:
    return 0, request.arrival
