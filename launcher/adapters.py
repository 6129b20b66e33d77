"""Adapters are read, and compared with the checkpoint, before any worker starts: so what is wrong with one is
said once, in one line."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from pipeline.adapters import named_folders, read_adapters
from pipeline.adapters.served import check_engine
from pipeline.adapters.tensors import tensors_in
from pipeline.config import Config

logger = logging.getLogger(__name__)


def check_adapters(config: Config, folder: Path) -> Config:
    """The config with the adapters' folders as workers find them. `folder`: of the model.

    Raises ValueError, naming adapter, key or tensor, for one that is not served or does not fit the model.
    """
    if not config.model.lora:
        return config
    found = named_folders(config.model.lora)
    located = tuple(f"{name}={place.resolve()}" for name, place in found.items())
    adapters = read_adapters(located)
    check_engine(config.vit.vit_engine, adapters)
    base = tensors_in(folder)
    for adapter in adapters:
        adapter.check_fits(base)
        ranks = sorted({module.rank for module in adapter.modules.values()})
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        tower = ", the ViT's among them" if adapter.adapts_tower else ""
        logger.info("adapter %r: %d layers%s, %s", adapter.name, len(adapter.modules), tower, shown)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, lora=located))
