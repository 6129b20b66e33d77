"""The default `max_pixels`: a checkpoint's own limit may keep a processor busy for minutes, or fill the pool
of embeddings with one picture."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.config import Config
from pipeline.families import VisionInfo, read_model_info
from pipeline.wire.base import GridTHW

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
    """The config with a `max_pixels` where no option gives one and the model's own is too large: of 1280
    tokens where ViTs compute on the CPU, and of embeddings that take a quarter of a ViT's pool."""
    if config.preprocess.max_pixels is not None:
        return config
    vision = read_model_info(folder, config.preprocess.min_pixels).vision
    least = min(CPU_TOKENS, _pool_tokens(config, vision, is_on_cpu=True))
    if vision.max_pixels <= least * vision.factor**2:
        return config  # whatever the device
    is_on_cpu = _is_on_cpu(config, environment, drivers, has_cuda)
    num_tokens = _pool_tokens(config, vision, is_on_cpu)
    reason = f"a picture takes at most a quarter of the {config.vit.embedding_pool_mib} MiB for embeddings"
    if is_on_cpu and num_tokens >= CPU_TOKENS:
        num_tokens, reason = CPU_TOKENS, "without a GPU"
    limit = max(num_tokens * vision.factor**2, vision.min_pixels)
    if limit >= vision.max_pixels:
        return config
    logger.info(
        "%s: pictures are seen in at most %d pixels (%d tokens), the model allows %d: --max-pixels says "
        "otherwise",
        reason, limit, limit // vision.factor**2, vision.max_pixels,
    )  # fmt: skip
    return dataclasses.replace(config, preprocess=dataclasses.replace(config.preprocess, max_pixels=limit))


def _pool_tokens(config: Config, vision: VisionInfo, is_on_cpu: bool) -> int:
    """How many rows of embeddings are a quarter of a ViT's pool. A pool of 0 grows with the pictures."""
    if not config.vit.embedding_pool_mib:
        return sys.maxsize
    may_be_wide = config.model.dtype == "float32" or (config.model.dtype == "auto" and is_on_cpu)
    dtype = "float32" if may_be_wide else "bfloat16"
    row = vision.embedding(GridTHW(1, vision.merge_size, vision.merge_size), dtype)
    return (config.vit.embedding_pool_mib << 20) // (4 * row.nbytes)


def _is_on_cpu(
    config: Config, environment: Mapping[str, str], drivers: Sequence[Path],
    has_cuda: Callable[[Mapping[str, str]], bool]
) -> bool:  # fmt: skip
    """As `choose_device` will decide. torch, slow to import, is asked only where a driver exists."""
    if config.model.device != "auto":
        return config.model.device == "cpu"
    hidden = environment.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    return hidden or not any(driver.exists() for driver in drivers) or not has_cuda(environment)
