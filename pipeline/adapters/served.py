"""The adapters that a pipeline serves: the option `--lora` names each, and its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.adapters.files import Adapter, read_adapter


def named_folders(options: Sequence[str]) -> Mapping[str, Path]:
    """In the order of the options, each name=folder."""
    return {name: Path(folder) for name, _, folder in (option.partition("=") for option in options)}


def read_adapters(options: Sequence[str]) -> Sequence[Adapter]:
    """Their order is that of the options in every worker: a step's plan names an adapter by its place.

    Raises ValueError as `read_adapter` does.
    """
    return [read_adapter(name, folder) for name, folder in named_folders(options).items()]


def check_engine(vit_engine: str, adapters: Sequence[Adapter]) -> None:
    """Raises ValueError where an adapter changes the tower, and the engine that is asked for computes from an
    exported file, which has none."""
    if vit_engine in ("auto", "torch"):
        return
    for adapter in adapters:
        if adapter.adapts_tower:
            raise ValueError(
                f"adapter {adapter.name!r} changes the ViT, which vit_engine {vit_engine!r} computes without "
                "adapters: take --vit-engine torch"
            )
