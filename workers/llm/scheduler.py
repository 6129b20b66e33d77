"""Decides which requests compute how many tokens in the next step. Pure: no torch, no sockets, no clock.

Continuous batching: decodes first, then prefills in the order of arrival, cut to the token budget and, each, to the first
placeholder whose embedding has not arrived. A request is admitted, first come first served, when the KV cache has room for
its prompt and all the tokens it may produce, so that no admitted request can get stuck for lack of blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from pipeline.sampling import FinishReason
from workers.llm.block_manager import BlockManager
from workers.llm.request import Request


class Scheduled(NamedTuple):
    request: Request
    num_tokens: int

    @property
    def is_sampled(self) -> bool:
        """Its last token is the newest there is, so the step yields the next one."""
        return self.request.num_computed_tokens + self.num_tokens == self.request.num_tokens


class Scheduler:
    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int, eos_token_ids: tuple[int, ...]) -> None:
        self.blocks = blocks
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.eos_token_ids = frozenset(eos_token_ids)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def capacity(self) -> int:
        """Tokens that fit the KV cache when nobody else is there."""
        return self.blocks.num_blocks * self.blocks.block_size

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Ends a request wherever it is and gives its blocks back."""
        if request in self.running:
            self.running.remove(request)
            self.blocks.free(request.request_id)
        else:
            self.waiting.remove(request)

    def schedule(self) -> list[Scheduled]:
        while self.waiting and len(self.running) < self.max_num_seqs and self.blocks.can_allocate(self.waiting[0].max_num_tokens):
            request = self.waiting.popleft()
            request.block_table = self.blocks.allocate(request.request_id, request.max_num_tokens)
            self.running.append(request)
        budget = self.max_num_batched_tokens
        scheduled: list[Scheduled] = []
        is_decode = [request.num_tokens - request.num_computed_tokens == 1 for request in self.running]
        decodes = [request for request, decodes in zip(self.running, is_decode, strict=True) if decodes]
        prefills = [request for request, decodes in zip(self.running, is_decode, strict=True) if not decodes]
        for request in decodes + prefills:
            num_tokens = min(budget, request.num_ready_tokens() - request.num_computed_tokens)
            if num_tokens > 0:
                scheduled.append(Scheduled(request, num_tokens))
                budget -= num_tokens
        return scheduled

    def update(self, scheduled: list[Scheduled], sampled: Mapping[str, int]) -> list[Request]:
        """Takes the step's results; returns the requests that have finished, with their reason set, their blocks freed."""
        finished: list[Request] = []
        for request, num_tokens in scheduled:
            request.num_computed_tokens += num_tokens
            if (token := sampled.get(request.request_id)) is None:
                continue
            request.output_token_ids.append(token)
            if token in self.eos_token_ids and not request.sampling.ignore_eos:
                request.finish_reason = FinishReason.STOP
            elif len(request.output_token_ids) >= request.max_tokens:
                request.finish_reason = FinishReason.LENGTH
            if request.finish_reason is not None:
                self.remove(request)
                finished.append(request)
        return finished
