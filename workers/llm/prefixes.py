"""Which prefixes of requests are found in the cache, awaited from other requests, published and kept. Pure.

Blocks are published as they are filled. Where layers keep a state, a prefix can be resumed only at a snapshot
of it, and those are few: at the boundaries of a prompt, and one that moves along with the answer. Where the
text of an answer is guessed, a snapshot may be of the state behind a guess. It is dropped if the guess was
wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from workers.llm.cache.boundaries import boundaries_of, last_place
from workers.llm.cache.manager import CacheManager
from workers.llm.request import Request


class Save(NamedTuple):
    """A place of the snapshots, reserved for the state behind the first `position` tokens."""

    place: int
    position: int


class Prefixes:
    """`has_cache`: all requests share their prefixes; else the choices of one request do."""

    def __init__(
        self, cache: CacheManager, has_cache: bool, prefill_multiple: int, turn_start_id: int | None
    ) -> None:
        self._cache, self.has_cache = cache, has_cache
        # Hashes of blocks on their way into the cache; of layers with a state, those with a snapshot.
        self._computing: dict[bytes, Request] = {}
        self._turn_start_id = turn_start_id
        self._snapshot_multiple = math.lcm(prefill_multiple, cache.block_size)

    def prepare(self, request: Request) -> None:
        """To be called when the request comes, and when it is preempted."""
        # Its choices share the prompt's blocks, no other request does.
        if not self.has_cache or request.sampling.prompt_logprobs is not None:
            request.cache_salt = f"{request.request_id}/{request.attempt}/".encode() + request.client_id
        if self._cache.snapshots is not None and self._keeps_states(request):
            request.boundaries = boundaries_of(
                request.prompt_token_ids, request.items, self._turn_start_id, self._snapshot_multiple,
                max_count=-(-self._cache.snapshots.num_places // 2),
            )  # fmt: skip

    # At the start of a request.

    def hashes(self, request: Request) -> list[bytes]:
        """Hashes of the full blocks before the last token, which must be left to compute."""
        if not self._publishes(request):
            return []
        size = self._cache.block_size
        return request.block_hashes((request.num_tokens - 1) // size, size)

    def is_awaited(self, hashes: Sequence[bytes], num_found: int) -> bool:
        """Whether another request computes the next block of this prefix: it is worth to start once that
        block is in the cache. A state cannot go on from the next block, but from the next snapshot."""
        stop = num_found + 1 if self._cache.snapshots is None else len(hashes)
        return not self._computing.keys().isdisjoint(hashes[num_found:stop])

    def start(self, request: Request, hashes: Sequence[bytes], num_found: int) -> None:
        """The request runs from now on, and others may wait for its blocks behind those found."""
        self._computing.update(dict.fromkeys(self._hashes_to_come(request, hashes, num_found), request))

    def stop(self, request: Request) -> None:
        """The request has ended, or is preempted."""
        for digest in [digest for digest, owner in self._computing.items() if owner is request]:
            del self._computing[digest]

    def use_snapshots(self, found: Sequence[bytes]) -> int:
        """The place of the snapshot behind the blocks that were found; -1: none. Those before it are in use,
        too: the shorter a prefix is, the more requests share it."""
        snapshots = self._cache.snapshots
        if snapshots is None:
            return -1
        places = [snapshots.use(digest) for digest in reversed(found) if digest in snapshots]
        return places[0] if places else -1

    def num_shared_tokens(self, choices: Sequence[Request]) -> int:
        """Prompt tokens that a request's choices share: those in full blocks, which one choice computes."""
        if not choices or not self._publishes(choices[0]):
            return 0
        num_tokens, block_size = len(choices[0].prompt_token_ids), self._cache.block_size
        if self._cache.snapshots is None:
            return (num_tokens - 1) // block_size * block_size
        return last_place(num_tokens, self._snapshot_multiple)

    # In a step.

    def reserve(self, request: Request, start: int, stop: int, num_drafts: int) -> Sequence[Save]:
        """Places for the states at the prompt's boundaries in a part of it, tokens [start, stop); behind the
        prompt, for that behind `stop` or behind one of the drafts there."""
        snapshots, multiple = self._cache.snapshots, self._snapshot_multiple
        if snapshots is None or not self._keeps_states(request):
            return ()
        saves: list[Save] = []
        for position in request.boundaries_within(start, stop):
            digest = self._hash_at(request, position)
            if digest in snapshots:
                snapshots.use(digest)
            elif (place := snapshots.reserve()) is not None:
                saves.append(Save(place, position))
        position = -(-stop // multiple) * multiple
        if len(request.prompt_token_ids) < position <= stop + num_drafts:
            if not snapshots.has_free_place:  # rather its own than another's
                snapshots.forget(request.answer_snapshot)
            if (place := snapshots.reserve()) is not None:
                saves.append(Save(place, position))
        return saves

    # Behind a step.

    def publish_blocks(self, request: Request, num_known_tokens: int) -> None:
        """So many of its tokens have right keys and values in the cache."""
        num_full = min(num_known_tokens, request.num_tokens - 1) // self._cache.block_size
        if num_full <= request.num_published_blocks or not self._publishes(request):
            return
        hashes = request.block_hashes(num_full, self._cache.block_size)
        for index in range(request.num_published_blocks, num_full):
            self._cache.publish(request.block_table[index], hashes[index])
            if self._computing.get(hashes[index]) is request:
                del self._computing[hashes[index]]
        request.num_published_blocks = num_full

    def publish_snapshots(self, request: Request, saves: Sequence[Save], num_known_tokens: int) -> None:
        """Also those of a request that was preempted meanwhile: the copies were made. Behind its prompt a
        request has one snapshot, which moves along. That of a wrong draft is dropped."""
        for save in saves:
            if save.position > min(num_known_tokens, request.num_tokens - 1):
                self.release([save])
            else:
                self._publish_snapshot(request, save)

    def _publish_snapshot(self, request: Request, save: Save) -> None:
        snapshots, digest = self._cache.snapshots, self._hash_at(request, save.position)
        assert snapshots is not None
        boundary = request.boundary_at(save.position)
        is_new = snapshots.publish(save.place, digest, is_frame=boundary is not None and boundary.is_frame)
        if save.position > len(request.prompt_token_ids) and request.answer_snapshot != digest:
            snapshots.forget(request.answer_snapshot)
            request.answer_snapshot = digest if is_new else b""  # else it is another's

    def release(self, saves: Sequence[Save]) -> None:
        """These places are not needed."""
        for save in saves:
            assert self._cache.snapshots is not None
            self._cache.snapshots.release(save.place)

    def check_integrity(self, running: Sequence[Request]) -> None:
        is_awaited_from_nobody = any(request not in running for request in self._computing.values())
        assert not is_awaited_from_nobody, "blocks are awaited from nobody"

    def _hash_at(self, request: Request, stop: int) -> bytes:
        return request.block_hashes(stop // self._cache.block_size, self._cache.block_size)[-1]

    def _hashes_to_come(self, request: Request, hashes: Sequence[bytes], num_found: int) -> Sequence[bytes]:
        """Those that other requests may wait for."""
        if self._cache.snapshots is None:
            return hashes[num_found:]
        counts = [boundary.position // self._cache.block_size for boundary in request.boundaries]
        return [hashes[count - 1] for count in counts if count > num_found]

    def _keeps_states(self, request: Request) -> bool:
        """Whether anybody can find them: a request for its prompt's log-probabilities shares with none but
        its own choices."""
        is_shared = request.sampling.prompt_logprobs is None or request.sampling.n > 1
        return is_shared and self._publishes(request)

    def _publishes(self, request: Request) -> bool:
        """Whether its blocks are published: for all requests, or for the other choices of its request."""
        return self._cache.has_prefixes and (self.has_cache or request.sampling.n > 1)
