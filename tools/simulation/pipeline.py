"""The whole pipeline in simulated time: clients, preprocessing, ViTs, groups, and what clients saw.

It decides as the server does, by the server's own code (scheduler, batcher, slots, routers); only the times
are those of `stages.py`. Not simulated: failures, several tenants, videos, guesses, overlap of steps, and
contention for cores but for turns of LLM and ViT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pipeline.families import ModelInfo
from pipeline.wire.base import ChunkKey, Order
from pipeline.wire.generation import MmItem, Span
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.topology import Role, WorkerId
from tools.simulation.clock import Busy, Clock
from tools.simulation.llm import Group, Limits
from tools.simulation.load import Load, Submission
from tools.simulation.preprocess import Preprocess
from tools.simulation.stages import StageTimes
from tools.simulation.turns import Turns
from tools.simulation.vit import Vit
from workers.llm.chunk import Chunk, Lease, chunks_of
from workers.llm.request import Request
from workers.preprocess.router import GroupRouter, prefix_hashes

MIB = 1 << 20
ATTEMPT = 1
SHARED_TOKEN = 1  # of shared beginnings
FIRST_TOKEN = 100  # requests' own tokens are this and their number: no two share a prefix
PLACEHOLDER = 2


class Size(NamedTuple):
    """How many processes there are of each kind."""

    num_vits: int = 1
    num_readers: int = 4  # that decode pictures, for preprocessing
    num_groups: int = 1


class Settings(NamedTuple):
    """As the server's options of these names."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_itl_stretch: float = 1.25
    prefix_caching: bool = True
    vit_max_batch_patches: int = 4096
    pixel_pool_mib: int = 256
    embedding_pool_mib: int = 256


@dataclass(slots=True)
class Outcome:
    """What a client saw of one request: seconds of the simulation."""

    sent: float
    arrivals: list[float] = field(default_factory=list)  # of tokens
    ended: float = 0.0

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


class Simulated(NamedTuple):
    outcomes: list[Outcome]  # by submission
    wall: float  # until the last token
    stages: list[Busy]
    num_preempted: int


class Pipeline:
    def __init__(
        self, stages: StageTimes, info: ModelInfo, size: Size, settings: Settings, load: Load
    ) -> None:
        """Raises ValueError where LLM and ViTs take turns, but there are several of either."""
        if min(size) < 1:
            raise ValueError(f"there must be at least one process of each kind, got {size}")
        turns_taken = stages.sharing == "turns"
        if turns_taken and (size.num_groups > 1 or size.num_vits > 1):
            raise ValueError(
                "these times are of an LLM and a ViT that take turns on the same cores, so more of either "
                "help nobody: --sharing own gives each process as many cores of its own"
            )
        self.clock, self._stages, self._load = Clock(), stages, load
        self.busy = [
            Busy("preprocess", size.num_readers), Busy("vit", size.num_vits), Busy("llm", size.num_groups),
        ]  # fmt: skip
        self.preprocess = Preprocess(
            self.clock, stages, size.num_readers, info.largest_pixel_bytes, settings.pixel_pool_mib * MIB,
            self.busy[0], self._prepared,
        )  # fmt: skip
        turns = Turns(self.clock, turns_taken)
        self.vits = [
            Vit(
                self.clock, index, stages, info.vision, turns, self, self.busy[1],
                settings.embedding_pool_mib * MIB, settings.vit_max_batch_patches,
            )
            for index in range(size.num_vits)
        ]  # fmt: skip
        self.preprocess.connect(self.vits)
        limits = Limits(
            settings.max_num_seqs, settings.max_num_batched_tokens, settings.max_itl_stretch,
            settings.prefix_caching,
        )  # fmt: skip
        self.groups = [
            Group(
                self.clock, lead, stages, limits, turns, self.busy[2], self._on_token, self._on_finished,
                self._on_lost, self._on_covered, self._release,
            )
            for lead in range(size.num_groups)
        ]  # fmt: skip
        self._router = GroupRouter(range(size.num_groups))
        self._num_routed: dict[str, tuple[int, int]] = {}  # group and tokens
        self.outcomes = [Outcome(0.0) for _ in load.submissions]
        self._next = 0  # submission of a closed loop
        self._contents: dict[str, Submission] = {}

    def run(self) -> Simulated:
        if self._load.concurrency:
            for _ in range(min(self._load.concurrency, len(self._load.submissions))):
                self._send_next()
        else:
            for submission in self._load.submissions:
                self.clock.after(submission.at, lambda submission=submission: self._send(submission))  # type: ignore[misc]
        self.clock.run()
        wall = max((one.ended for one in self.outcomes), default=0.0)
        return Simulated(
            self.outcomes, wall, self.busy, sum(group.scheduler.num_preemptions for group in self.groups)
        )

    # Clients.

    def _send_next(self) -> None:
        if self._next < len(self._load.submissions):
            self._next += 1
            self._send(self._load.submissions[self._next - 1])

    def _send(self, submission: Submission) -> None:
        self.outcomes[submission.number].sent = self.clock.now
        self.clock.after(self._stages.front_s, lambda: self.preprocess.submit(submission))

    def _on_token(self, request: Request) -> None:
        arrivals = self.outcomes[request.arrival - 1].arrivals
        if not arrivals:
            lead, num_tokens = self._num_routed[request.request_id]
            self._num_routed[request.request_id] = lead, self._router.computed(lead, num_tokens)
        arrivals.append(self.clock.now)

    def _on_finished(self, request: Request) -> None:
        lead, num_tokens = self._num_routed.pop(request.request_id)
        self._router.finished(lead, num_tokens)
        del self._contents[request.request_id]
        self.outcomes[request.arrival - 1].ended = self.clock.now
        if self._load.concurrency:
            self._send_next()

    # From preprocessing.

    def _prepared(self, submission: Submission) -> None:
        request_id = f"request-{submission.number}"
        arrival = submission.number + 1
        shared = min(submission.num_shared_tokens, submission.num_text_tokens)
        tokens = [SHARED_TOKEN] * shared
        spans: list[Span] = []
        for picture in submission.pictures:
            spans.append(Span(len(tokens), picture.num_tokens))
            tokens += [PLACEHOLDER] * picture.num_tokens
        tokens += [FIRST_TOKEN + submission.number] * (submission.num_text_tokens - shared)
        content = [(picture.content, span) for picture, span in zip(submission.pictures, spans, strict=True)]
        bare = [MmItem((span,), name, name, ()) for name, span in content]
        lead, num_tokens = self._router.choose(prefix_hashes(tokens, bare, b""), len(tokens))
        self._num_routed[request_id], self._contents[request_id] = (lead, num_tokens), submission
        keys = [ChunkKey(request_id, ATTEMPT, item, 0, lead) for item in range(len(submission.pictures))]
        items = tuple(
            MmItem((span,), name, name, (self.preprocess.route(key, picture, Order(arrival, key.item)),))
            for key, picture, (name, span) in zip(keys, submission.pictures, content, strict=True)
        )
        request = Request(
            client_id=b"client", request_id=request_id, attempt=ATTEMPT, arrival=arrival,
            prompt_token_ids=tokens, positions=np.zeros((3, 0), np.int32), position_delta=0,
            chunks=[chunk for number, item in enumerate(items) for chunk in chunks_of(number, item)],
            items=items, sampling=SamplingParams(ignore_eos=True), max_tokens=submission.num_output,
        )  # fmt: skip
        self.groups[lead].add(request)
        self.preprocess.announce(keys)

    # From ViTs.

    def on_miss(self, key: ChunkKey) -> None:
        self.preprocess.on_miss(key)

    def on_released(self, key: ChunkKey) -> None:
        self.preprocess.on_released(key)

    def on_ready(self, key: ChunkKey, vit: int, lease_id: int) -> None:
        lease, group = Lease(WorkerId(Role.VIT, vit), 1, lease_id), self.groups[key.lead]
        self.clock.after(
            self._stages.hand_off_s, lambda: group.on_embeddings(key.request_id, key.item, lease)
        )

    def on_lease_gone(self, key: ChunkKey) -> None:
        """A preempted request needs a picture that its ViT has evicted. The server's client submits the
        request again; here its picture alone goes the whole way again."""
        submission = self._contents[key.request_id]
        self.preprocess.route(key, submission.pictures[key.item], Order(submission.number + 1, key.item))
        self.preprocess.announce([key])

    # From groups.

    def _on_lost(self, request: Request, chunk: Chunk) -> None:
        key = ChunkKey(request.request_id, ATTEMPT, chunk.item, 0, self._num_routed[request.request_id][0])
        self.vits[chunk.wire.vit].lease_again(key, chunk.wire.mm_hash)

    def _on_covered(self, request: Request, chunk: Chunk) -> None:
        key = ChunkKey(request.request_id, ATTEMPT, chunk.item, 0, self._num_routed[request.request_id][0])
        # A message: it comes behind what preprocessing does now, as announcing these pictures.
        self.clock.after(0.0, lambda: self.preprocess.cancel(key))

    def _release(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            self.vits[lease.owner.rank].release([lease.lease_id])


def simulate(stages: StageTimes, info: ModelInfo, size: Size, settings: Settings, load: Load) -> Simulated:
    """Runs a load to its end, and checks that each request ended once and nothing is held."""
    pipeline = Pipeline(stages, info, size, settings, load)
    simulated = pipeline.run()
    for submission, outcome in zip(load.submissions, simulated.outcomes, strict=True):
        if len(outcome.arrivals) != submission.num_output or not outcome.ended:
            raise RuntimeError(f"request {submission.number} did not end: it does not fit into the KV cache")
    assert not pipeline.preprocess.num_open, "a picture is lost"
    for group in pipeline.groups:
        group.scheduler.check_integrity()
        group.scheduler.cache.check_empty()
    for vit in pipeline.vits:
        vit.batcher.check_integrity()
        assert not vit.batcher.cache.num_leases, "a lease is lost"
    return simulated
