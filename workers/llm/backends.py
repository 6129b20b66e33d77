"""What computes a step beside the matrix products: the attention, the fused kernels, the choice of tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from workers.llm.attention.base import AttentionBackend
from workers.llm.attention.native import NativeAttention
from workers.llm.attention.torch import PagedAttention
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.sampling.choice import Kernel
from workers.nn.delta.backends import choose_delta_backend
from workers.nn.fused import Kernels
from workers.nn.native import operators


class Backend(NamedTuple):
    name: str
    attention: Callable[[PagedTensors], AttentionBackend]
    kernels: Kernels | None  # None: torch's operators
    sample: Kernel | None  # None: torch's operators choose tokens, and the host decides row by row


def choose_backend(name: str, device: torch.device, linear_attention: str = "auto") -> Backend:
    """`auto` is Triton on a GPU; on the CPU the compiled kernels, or torch where there are none. On the CPU
    Triton runs only in its interpreter, which is for tests. linear_attention: see `choose_delta_backend`.

    Raises ValueError when what is asked for is not installed. Triton and FlashAttention are imported here
    and only when needed: an installation for the CPU has neither.
    """
    if name == "auto":
        name = "triton" if device.type == "cuda" else "native" if operators.kernels else "torch"
    backend = BACKENDS[name](name, device)
    if backend.kernels is None and linear_attention in ("auto", "torch"):
        return backend
    of_states = choose_delta_backend(linear_attention, device)
    if backend.kernels is None:
        raise ValueError(
            f"linear_attention {linear_attention!r} goes with attention 'triton' or 'flash3', not {name!r}"
        )
    return backend._replace(kernels=backend.kernels._replace(linear_attention=of_states))


def _torch(name: str, device: torch.device) -> Backend:
    return Backend(name, PagedAttention, None, None)


def _native(name: str, device: torch.device) -> Backend:
    if device.type != "cpu":
        raise ValueError(f"attention {name!r} is for the CPU, but this rank computes on {device}")
    if operators.kernels is None:
        raise ValueError(
            f"attention {name!r} needs the compiled kernels: install the package where there is GCC 10 "
            "or later"
        )
    return Backend(name, _native_or_torch, None, None)


def _native_or_torch(cache: PagedTensors) -> AttentionBackend:
    return NativeAttention(cache) if NativeAttention.takes(cache) else PagedAttention(cache)


def _triton(name: str, device: torch.device) -> Backend:
    _need_triton(name, device)
    from workers.llm.attention.triton import TritonAttention

    return _with_kernels(name, TritonAttention)


def _flash3(name: str, device: torch.device) -> Backend:
    _need_triton(name, device)
    if importlib.util.find_spec("flash_attn_interface") is None:
        raise ValueError(
            "attention 'flash3' needs FlashAttention-3, which has the module flash_attn_interface",
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9:
        raise ValueError("attention 'flash3' is for Hopper GPUs")
    from workers.llm.attention.flash3 import Flash3Attention

    return _with_kernels(name, Flash3Attention)


# By the option `--attention`.
BACKENDS: Mapping[str, Callable[[str, torch.device], Backend]] = {
    "torch": _torch,
    "native": _native,
    "triton": _triton,
    "flash3": _flash3,
}


def _need_triton(name: str, device: torch.device) -> None:
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            f"attention {name!r} needs the package triton, which comes with CUDA builds of torch",
        )
    if device.type != "cuda" and not _is_interpreted():
        raise ValueError(f"attention {name!r} needs a GPU, but this rank computes on {device}")


def _with_kernels(name: str, attention: Callable[[PagedTensors], AttentionBackend]) -> Backend:
    from workers.llm.sampling.kernel import sample
    from workers.nn.expert_kernels import choose_experts, experts
    from workers.nn.kernels import add_rms_norm, silu_mul

    return Backend(name, attention, Kernels(add_rms_norm, silu_mul, choose_experts, experts), sample)


def _is_interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
