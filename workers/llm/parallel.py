"""Tensor parallelism: which part of each weight a rank holds, and the collectives between ranks."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.families import TextInfo

START_TIMEOUT_S = 300


class TensorParallel:
    """One rank of `size`. Alone it does nothing."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def connect(cls, rank: int, size: int, device: torch.device, rendezvous: Path) -> TensorParallel:
        """Joins the group that meets at the file `rendezvous`; NCCL on CUDA, gloo on the CPU."""
        if size > 1:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size,
                timeout=timedelta(seconds=START_TIMEOUT_S),
            )  # fmt: skip
        return cls(rank, size)

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather_last(self, x: Tensor) -> Tensor:
        """The ranks' parts [..., n] side by side as [..., size · n], on every rank."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=-1)

    def smallest(self, value: int) -> int:
        """The smallest of the ranks' values, on every rank."""
        if self.size == 1:
            return value
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        shared = torch.tensor(value, dtype=torch.int64, device=device)
        dist.all_reduce(shared, dist.ReduceOp.MIN)
        return int(shared)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


class HeadLayout:
    """The heads of one rank. Where there are fewer KV heads than ranks each is held by several.

    Raises ValueError, with the numbers, for head counts that do not divide.
    """

    def __init__(self, info: TextInfo, rank: int, size: int) -> None:
        if info.num_heads % size:
            raise ValueError(f"tp {size} does not divide the model's {info.num_heads} attention heads")
        if info.num_kv_heads % size and size % info.num_kv_heads:
            raise ValueError(f"tp {size} and the model's {info.num_kv_heads} KV heads do not divide one another")
        if info.intermediate_size % size:
            raise ValueError(f"tp {size} does not divide the model's intermediate size {info.intermediate_size}")
        self.num_heads = info.num_heads // size
        self.num_kv_heads = max(1, info.num_kv_heads // size)
        self.head_dim = info.head_dim
        first_kv = rank * info.num_kv_heads // size
        self.query_rows = slice(rank * self.num_heads * info.head_dim, (rank + 1) * self.num_heads * info.head_dim)
        self.kv_rows = slice(first_kv * info.head_dim, (first_kv + self.num_kv_heads) * info.head_dim)
        self.mlp_rows = slice(rank * info.intermediate_size // size, (rank + 1) * info.intermediate_size // size)
        self.vocab_per_rank = -(-info.vocab_size // size)  # the last rank's part may be shorter and is padded
        self.vocab_rows = slice(min(rank * self.vocab_per_rank, info.vocab_size), min((rank + 1) * self.vocab_per_rank, info.vocab_size))
