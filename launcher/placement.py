"""Which cores, how many threads and which GPU each worker gets. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from pipeline.process.process import Placement
from pipeline.wire.topology import Role, WorkerId

# Of the cores, for a decode step: it is bound by the memory's rate, which fewer cores do not reach. With two
# cores one reads at 0.6 of the rate of both.
ENOUGH = 0.75


def workers(
    num_vits: int, num_ranks: int, has_gateway: bool = False, num_carriers: int = 0
) -> list[WorkerId]:
    """All workers of a pipeline, in the order in which they are started."""
    return [
        *(WorkerId(Role.LLM, rank) for rank in range(num_ranks)),
        *(WorkerId(Role.VIT, index) for index in range(num_vits)),
        *(WorkerId(Role.CARRIER, node) for node in range(num_carriers)),
        WorkerId(Role.PREPROCESS),
        WorkerId(Role.API),
        *([WorkerId(Role.GATEWAY)] if has_gateway else []),
    ]


def place(
    cores: Sequence[int], num_vits: int, num_ranks: int, num_llm_cores: int | None = None,
    num_vit_cores: int | None = None,
    is_elastic: bool = False, can_take_turns: bool = False,
) -> dict[WorkerId, Placement]:  # fmt: skip
    """A quarter of the cores, at least one, for the ViTs, the rest for the LLM ranks; other roles use any
    core.

    ViTs and ranks share no core unless there are more of them than cores: two that wait for each other's
    threads have ten times the tail latency. `num_llm_cores` gives the ranks the first so many cores,
    `num_vit_cores` the ViTs the last; these two may overlap. `is_elastic`: a role that computes alone gets
    all cores, if no number was given; with `can_take_turns` also while the other role has work, in turn,
    where the LLM's share would be less than `ENOUGH` of the cores. Rank i goes to GPU i, and so does ViT i,
    modulo the number of GPUs (which `choose_device` knows).
    """
    vit_cores, llm_cores = cores, cores
    if len(cores) > 1:
        split = max(1, len(cores) // 4)
        vit_cores, llm_cores = cores[-split:], cores[:-split]
    if num_llm_cores is not None:
        llm_cores = cores[:num_llm_cores]
    if num_vit_cores is not None:
        vit_cores = cores[-num_vit_cores:]
    has_shares = num_llm_cores is None and num_vit_cores is None
    takes_turns = can_take_turns and has_shares and len(llm_cores) < ENOUGH * len(cores)
    placement: dict[WorkerId, Placement] = {}
    for role, own, number, count in (
        (Role.VIT, vit_cores, num_vit_cores, num_vits),
        (Role.LLM, llm_cores, num_llm_cores, num_ranks),
    ):
        for index in range(count):
            share = _share(own, index, count)
            if is_elastic and number is None and len(own) < len(cores):
                wide = _share(cores, index, count).cores
                share = dataclasses.replace(share, wide_cores=wide, takes_turns=takes_turns)
            placement[WorkerId(role, index)] = share
    for role in (Role.PREPROCESS, Role.API, Role.GATEWAY, Role.CARRIER):
        placement[WorkerId(role)] = Placement(cores=tuple(cores), num_threads=len(cores))
    return placement


def _share(cores: Sequence[int], index: int, count: int) -> Placement:
    if count > len(cores):
        return Placement(cores=tuple(cores), num_threads=1, device=index)
    own = tuple(cores[index * len(cores) // count : (index + 1) * len(cores) // count])
    return Placement(cores=own, num_threads=len(own), device=index)


def by_global_rank(
    placement: Mapping[WorkerId, Placement], workers: Sequence[WorkerId]
) -> dict[WorkerId, Placement]:
    """The placement of one node's workers, whose ranks are among those of all nodes."""
    found: dict[WorkerId, Placement] = {}
    for role in Role:
        own = sorted(worker for worker in workers if worker.role is role)
        found.update({worker: placement[WorkerId(role, index)] for index, worker in enumerate(own)})
    return found
