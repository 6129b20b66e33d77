"""Which cores, how many threads and which GPU each worker gets. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.process import Placement
from pipeline.topology import Role, WorkerId


def workers(num_vits: int, num_ranks: int) -> list[WorkerId]:
    """All workers of a pipeline, in the order in which they are started."""
    return [
        *(WorkerId(Role.LLM, rank) for rank in range(num_ranks)),
        *(WorkerId(Role.VIT, index) for index in range(num_vits)),
        WorkerId(Role.PREPROCESS),
        WorkerId(Role.API),
    ]


def place(cores: Sequence[int], num_vits: int, num_ranks: int, num_llm_cores: int | None = None) -> dict[WorkerId, Placement]:
    """Divides the cores: a quarter, at least one, for the ViTs, the rest for the LLM ranks; API and preprocessing float.

    Processes that compute never share a core unless there are more of them than cores: two that wait for each other's threads
    cost ten times in the tail. With `num_llm_cores` the ranks have the first so many, be they the ViTs' or not. ViT i and rank i
    go to GPU i.
    """
    vit_cores, llm_cores = cores, cores
    if len(cores) > 1:
        split = max(1, len(cores) // 4)
        vit_cores, llm_cores = cores[-split:], cores[:-split]
    if num_llm_cores is not None:
        llm_cores = cores[:num_llm_cores]
    placement = {WorkerId(Role.VIT, index): _share(vit_cores, index, num_vits) for index in range(num_vits)}
    placement |= {WorkerId(Role.LLM, rank): _share(llm_cores, rank, num_ranks) for rank in range(num_ranks)}
    for role in (Role.PREPROCESS, Role.API):
        placement[WorkerId(role)] = Placement(cores=tuple(cores), num_threads=len(cores))
    return placement


def _share(cores: Sequence[int], index: int, count: int) -> Placement:
    if count > len(cores):
        return Placement(cores=tuple(cores), num_threads=1, device=index)
    own = tuple(cores[index * len(cores) // count : (index + 1) * len(cores) // count])
    return Placement(cores=own, num_threads=len(own), device=index)
