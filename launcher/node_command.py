"""What a placed node is to have, and its launcher's command line: read off the configuration of the driver.
Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from launcher.members import workers_on
from pipeline.config import ApiConfig, Config, DirectConfig
from pipeline.config.cluster import ClusterConfig
from pipeline.process.nodes import HEAD
from pipeline.wire.topology import Role

TOKEN_FILE = "/dev/stdin"  # a pipe that the node's launcher reads to its end: the secret is in no file


def bundle(config: Config, rank: int) -> dict[str, float]:
    """What Ray sets aside for a node, by its name of the resource."""
    cluster, own = config.cluster, workers_on(rank, config)
    if cluster.head_only and rank == HEAD:
        own = [worker for worker in own if worker.role not in (Role.LLM, Role.VIT)]
    if cluster.vit_only and rank != HEAD:
        own = [worker for worker in own if worker.role is not Role.LLM]
    num_gpus = cluster.ray_gpus
    if num_gpus is None:
        # ViT i has the GPU of rank i; only where there is no rank does it need one of its own.
        counts = [sum(worker.role is role for worker in own) for role in (Role.LLM, Role.VIT)]
        num_gpus = 0 if config.model.device == "cpu" else counts[0] or counts[1]
    num_cpus = len(own) if cluster.ray_cpus is None else cluster.ray_cpus
    return {"CPU": max(1, num_cpus), **({"GPU": num_gpus} if num_gpus else {})}


def node_config(config: Config, rank: int, head_address: str) -> Config:
    """The configuration of one node. What only the head uses goes to nobody else: it may be a secret, or a
    file that only the head's machine has."""
    cluster = ClusterConfig()
    if config.cluster.has_nodes:
        cluster = dataclasses.replace(
            config.cluster,
            placement="none",
            ray_cpus=None,
            ray_gpus=None,
            node_rank=rank,
            master_addr=head_address,
            node_token_file=TOKEN_FILE,
            head_only=config.cluster.head_only and rank == HEAD,
            vit_only=config.cluster.vit_only and rank != HEAD,
        )
    found = dataclasses.replace(config, cluster=cluster)
    if run_dir := config.launcher.run_dir:
        # Two nodes may be on one machine.
        found = dataclasses.replace(
            found, launcher=dataclasses.replace(config.launcher, run_dir=str(Path(run_dir) / str(rank)))
        )
    if rank == HEAD:
        return found
    media = dataclasses.replace(config.preprocess, media_proxy="", allowed_local_media_path="")
    return dataclasses.replace(found, api=ApiConfig(), direct=DirectConfig(), preprocess=media)


def arguments_of(config: Config) -> tuple[str, ...]:
    """The command line that `cli.parse` reads as this configuration."""
    return tuple(
        argument
        for section in dataclasses.fields(config)
        for argument in _section(getattr(config, section.name))
    )


def _section(part: object) -> Iterator[str]:
    for field in dataclasses.fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if not field.metadata or value == field.default:
            continue
        name = field.name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        elif isinstance(value, tuple):
            yield from (f"--{name}", *value)
        else:
            yield f"--{name}={value}"
