"""Which workers each node has, and what all nodes must agree on. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from launcher.placement import workers
from pipeline.config import Config
from pipeline.process.nodes import HEAD
from pipeline.transport.cluster import NodeSpec, label_of, meeting_label
from pipeline.transport.keys import KeyPair
from pipeline.wire.topology import CARRY, ENCODE, FEEDBACK, LANES, LLM, OUTPUTS, STEPS, Edge, Role, WorkerId

NO_KEYS = KeyPair(b"", b"")  # where only the places of workers are asked for
# Options of these sections must be the same on all nodes, but for those that name places of a machine.
SHARED = ("model", "vit", "llm", "carrier")
OF_A_MACHINE = ("model", "lora", "served_model_name", "download_from")
# The edges that a worker binds for the workers of other nodes.
DOORS: Mapping[Role, Sequence[Edge]] = {
    Role.PREPROCESS: (FEEDBACK,),
    Role.API: (LANES,),
    Role.VIT: (ENCODE,),
    Role.LLM: (LLM, OUTPUTS),
}


def node_spec(config: Config, own: KeyPair = NO_KEYS) -> NodeSpec:
    """Without what changes: doors, keys and urls."""
    return NodeSpec(
        node=config.cluster.node_rank,
        vits_per_node=config.vits_per_node,
        ranks_per_node=config.ranks_per_node,
        own=own,
    )


def all_workers(config: Config) -> list[WorkerId]:
    num_carriers = config.cluster.nnodes if config.cluster.has_nodes else 0
    return workers(config.num_vits, config.num_ranks, config.has_gateway, num_carriers)


def workers_on(node: int, config: Config) -> list[WorkerId]:
    node_of = node_spec(config).node_of
    return [worker for worker in all_workers(config) if node_of(worker) == node]


def doors_of(worker: WorkerId, config: Config) -> tuple[str, ...]:
    """Labels of the edges that it binds for other nodes."""
    if not config.cluster.has_nodes or (worker.role is Role.LLM and worker.rank not in config.leads):
        return ()
    if worker.role is Role.CARRIER:
        return _doors_of_carrier(worker, config)
    labels = [label_of(edge, worker.rank if edge.per_rank else 0) for edge in DOORS.get(worker.role, ())]
    if worker.role is Role.LLM and config.cluster.nodes_per_group > 1:
        labels += [label_of(STEPS, worker.rank), meeting_label(worker.rank)]
    return tuple(labels)


def _doors_of_carrier(carrier: WorkerId, config: Config) -> tuple[str, ...]:
    """Its own, and those in the place of workers of its node."""
    place, node = node_spec(config), carrier.rank
    return (
        label_of(CARRY, node),
        *(label_of(ENCODE, vit) for vit in place.vits_on(node) if node != HEAD),
        *(label_of(LLM, lead) for lead in place.leads_on(node, config.leads)),
    )


def shared_options(config: Config) -> dict[str, str]:
    """Those that all nodes must agree on, by name."""
    found: dict[str, str] = {}
    cluster = config.cluster
    for section in SHARED:
        part = getattr(config, section)
        for field in dataclasses.fields(part):
            if field.name not in OF_A_MACHINE:
                found[field.name] = repr(getattr(part, field.name))
    adapters = ", ".join(sorted(config.model.adapter_names))
    return {
        **found,
        "lora": adapters,
        "nnodes": str(cluster.nnodes),
        "node_timeout": str(cluster.node_timeout),
        "nodes_per_group": str(cluster.nodes_per_group),
    }


def difference(node: int, theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """A sentence about options that differ; empty where all agree."""
    names = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
    if not names:
        return ""
    shown = "; ".join(
        f"{name} is {theirs.get(name, 'unknown')} there and {ours.get(name, 'unknown')} at the head"
        for name in names
    )
    return f"node {node} was started with other options than the head: {shown}"
