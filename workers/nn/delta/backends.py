"""What computes layers with linear attention."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from workers.nn.delta.layer import GatedDeltaNet

logger = logging.getLogger(__name__)
FLA_CAPABILITY = (8, 0)  # of GPUs, the least that the package is made for
# The least. Older ones let no value heads share a key head, and ignore arguments that they do not know.
FLA_VERSION = (0, 6)


class DeltaBackend(NamedTuple):
    name: str
    net: type[GatedDeltaNet]
    has_spans: bool  # of its plans, see `plan_step`


BY_TORCH = DeltaBackend("torch", GatedDeltaNet, has_spans=False)


def choose_delta_backend(name: str, device: torch.device) -> DeltaBackend:
    """By the option `--linear-attention`. `auto` is flash-linear-attention on a GPU that it is made for,
    where it is installed; else Triton on a GPU; torch on the CPU.

    On the CPU Triton runs only in its interpreter, which is for tests. Raises ValueError when what is asked
    for is not installed or not for the device.
    """
    if name != "auto":
        return BACKENDS[name](name, device)
    if device.type != "cuda":
        return BY_TORCH
    if has_fla() and _is_for_fla(device):
        try:
            return _fla("fla", device)
        except ImportError as error:
            logger.warning("flash-linear-attention does not load: %s", error)
    return _triton("triton", device)


def _torch(name: str, device: torch.device) -> DeltaBackend:
    return BY_TORCH


def _triton(name: str, device: torch.device) -> DeltaBackend:
    _need_triton(name, device)
    from workers.nn.delta.triton import TritonDeltaNet

    return DeltaBackend(name, TritonDeltaNet, has_spans=True)


def _fla(name: str, device: torch.device) -> DeltaBackend:
    _need_triton(name, device)
    if not has_fla():
        raise ValueError(
            "linear_attention 'fla' needs the package flash-linear-attention, version "
            f"{'.'.join(map(str, FLA_VERSION))} or later, which has the module fla"
        )
    if device.type == "cuda" and not _is_for_fla(device):
        raise ValueError("linear_attention 'fla' is for GPUs of compute capability 8.0 or above")
    from workers.nn.delta.fla import FlaDeltaNet

    return DeltaBackend(name, FlaDeltaNet, has_spans=True)


BACKENDS: Mapping[str, Callable[[str, torch.device], DeltaBackend]] = {
    "torch": _torch,
    "triton": _triton,
    "fla": _fla,
}


def has_fla() -> bool:
    """Whether flash-linear-attention is installed, in a version that computes these layers."""
    if importlib.util.find_spec("fla") is None:
        return False
    try:
        found = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("fla-core"))
    except importlib.metadata.PackageNotFoundError:
        return False
    return found is not None and (int(found[1]), int(found[2])) >= FLA_VERSION


def _is_for_fla(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= FLA_CAPABILITY


def _need_triton(name: str, device: torch.device) -> None:
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            f"linear_attention {name!r} needs the package triton, which comes with CUDA builds of torch"
        )
    if device.type != "cuda" and not _is_interpreted():
        raise ValueError(f"linear_attention {name!r} needs a GPU, but this rank computes on {device}")


def _is_interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
