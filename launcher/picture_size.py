"""The default `max_pixels` without a GPU: a checkpoint's own limit may keep a processor busy for minutes."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.config import Config
from pipeline.families import read_model_info

logger = logging.getLogger(__name__)
CPU_TOKENS = 1280  # of one picture
DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # dxg: Linux on Windows (WSL)
PROBE = "import sys, torch; sys.exit(not torch.cuda.is_available())"
PROBE_TIMEOUT_S = 120.0  # torch's import, from a slow disk


def torch_has_cuda(environment: Mapping[str, str]) -> bool:
    """As workers find it. In a process of its own: torch takes long to import and much memory."""
    try:
        return not subprocess.run(
            [sys.executable, "-c", PROBE], env=dict(environment), capture_output=True, timeout=PROBE_TIMEOUT_S
        ).returncode
    except subprocess.TimeoutExpired:
        logger.warning(
            "torch did not say within %.0f s whether it has a GPU: there is a driver, so it is taken to "
            "have one",
            PROBE_TIMEOUT_S,
        )
        return True


def limit_pictures(
    config: Config, folder: Path, environment: Mapping[str, str], drivers: Sequence[Path] = DRIVERS,
    has_cuda: Callable[[Mapping[str, str]], bool] = torch_has_cuda,
) -> Config:  # fmt: skip
    """The config with `max_pixels` of 1280 tokens, where ViTs compute on the CPU, no option is given, and the
    model allows more."""
    if config.preprocess.max_pixels is not None:
        return config
    vision = read_model_info(folder, config.preprocess.min_pixels).vision
    limit = CPU_TOKENS * vision.factor**2
    if not vision.min_pixels <= limit < vision.max_pixels or not _is_on_cpu(
        config, environment, drivers, has_cuda
    ):
        return config
    logger.info(
        "without a GPU pictures are seen in at most %d pixels (%d tokens), the model allows %d: "
        "--max-pixels says otherwise",
        limit, CPU_TOKENS, vision.max_pixels,
    )  # fmt: skip
    return dataclasses.replace(config, preprocess=dataclasses.replace(config.preprocess, max_pixels=limit))


def _is_on_cpu(
    config: Config, environment: Mapping[str, str], drivers: Sequence[Path],
    has_cuda: Callable[[Mapping[str, str]], bool]
) -> bool:  # fmt: skip
    """As `choose_device` will decide. torch, slow to import, is asked only where a driver exists."""
    if config.model.device != "auto":
        return config.model.device == "cpu"
    hidden = environment.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    return hidden or not any(driver.exists() for driver in drivers) or not has_cuda(environment)
