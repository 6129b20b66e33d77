"""How large pictures are seen where there is no GPU: a checkpoint's own limit may keep a processor busy for minutes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config import Config
from pipeline.families import read_model_info

logger = logging.getLogger(__name__)
CPU_TOKENS = 1280  # of one picture
DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # the latter of Windows' Linux


def limit_pictures(config: Config, folder: Path, environment: Mapping[str, str], drivers: Sequence[Path] = DRIVERS) -> Config:
    """The same with `max_pixels` of 1280 tokens where the ViTs compute on the CPU, nobody said otherwise, and the model allows more."""
    if config.preprocess.max_pixels is not None or not _is_on_cpu(config, environment, drivers):
        return config
    vision = read_model_info(folder, config.preprocess.min_pixels).vision
    limit = CPU_TOKENS * vision.factor**2
    if not vision.min_pixels <= limit < vision.max_pixels:
        return config
    logger.info(
        "without a GPU pictures are seen in at most %d pixels (%d tokens), the model allows %d: --max-pixels says otherwise",
        limit, CPU_TOKENS, vision.max_pixels,
    )  # fmt: skip
    return dataclasses.replace(config, preprocess=dataclasses.replace(config.preprocess, max_pixels=limit))


def _is_on_cpu(config: Config, environment: Mapping[str, str], drivers: Sequence[Path]) -> bool:
    if config.model.device != "auto":
        return config.model.device == "cpu"
    hidden = environment.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    return hidden or not any(driver.exists() for driver in drivers)
