"""Tensor parallelism: which part of each weight a rank holds, and the collectives between ranks."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.families import TextInfo
from workers.llm.meeting import Meeting
from workers.llm.shared_memory import SharedMemory, is_available
from workers.nn.weights.shard import WHOLE, ExpertsShard, Shard

START_TIMEOUT_S = 300
ONE_SHOT_BYTES = 256 << 10  # above it, who sums a part and hands it on is faster than everybody summing all


class SymmetricMemory:
    """All-reduce through a buffer that every rank has mapped from all others. For small tensors, of which
    NCCL's latency is most.

    Never run so far: it takes several GPUs, with NVLink.
    """

    def __init__(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symm_mem

        world = dist.group.WORLD
        assert world is not None
        self._buffer = symm_mem.empty(num_elements, dtype=dtype, device=device)
        handle = symm_mem.rendezvous(self._buffer, world)
        self._group = world.group_name
        self._has_multicast = handle.multicast_ptr != 0  # the switch adds
        self._max_one_shot = ONE_SHOT_BYTES // dtype.itemsize

    def can_reduce(self, x: Tensor) -> bool:
        return x.dtype == self._buffer.dtype and x.numel() <= self._buffer.numel()

    def all_reduce(self, x: Tensor) -> Tensor:
        part = self._buffer[: x.numel()].view(x.shape)
        part.copy_(x)
        ops = torch.ops.symm_mem
        if self._has_multicast:
            ops.multimem_all_reduce_(part, "sum", self._group)
        elif x.numel() <= self._max_one_shot:
            return ops.one_shot_all_reduce(part, "sum", self._group)  # type: ignore[no-any-return]
        else:
            ops.two_shot_all_reduce_(part, "sum", self._group)
        return x.copy_(part)


class TensorParallel:
    """One rank of `size`. Alone it does nothing.

    has_whole_experts: a rank holds some of a layer's experts, instead of a part of each.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        device: torch.device | None = None,
        has_whole_experts: bool = False,
    ) -> None:
        self.rank, self.size, self._device = rank, size, device
        self.has_whole_experts = has_whole_experts
        self.maps_pools = True  # of ViTs; on another node than the lead's, no rank can
        self._symmetric: SymmetricMemory | None = None
        self._shared: SharedMemory | None = None

    def use_symmetric_memory(self, num_elements: int, dtype: torch.dtype) -> None:
        """For all-reduces of up to so many elements. Raises ValueError on the CPU."""
        if self.size == 1:
            return
        if self._device is None or self._device.type != "cuda":
            raise ValueError("all_reduce 'symmetric' needs GPUs")
        self._symmetric = SymmetricMemory(num_elements, dtype, self._device)

    @classmethod
    def connect(
        cls,
        rank: int,
        size: int,
        device: torch.device,
        rendezvous: Path | Meeting,
        has_whole_experts: bool = False,
    ) -> TensorParallel:
        """Joins the group that meets at the file `rendezvous`, or over several nodes; NCCL on CUDA, shared
        memory or else gloo on the CPU."""
        made = cls(rank, size, device, has_whole_experts)
        if size == 1:
            return made
        timeout = timedelta(seconds=START_TIMEOUT_S)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if isinstance(rendezvous, Meeting):
            made.maps_pools = rendezvous.is_on_leads_node
            rendezvous.join(backend, rank, size, timeout)
            return made
        dist.init_process_group(
            backend, init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timeout
        )
        if device.type == "cpu" and is_available():
            made._shared = SharedMemory.connect(rank, size)
        return made

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x, in place of x or elsewhere."""
        if self._symmetric is not None and self._symmetric.can_reduce(x):
            return self._symmetric.all_reduce(x)
        if self._shared is not None:
            return self._shared.all_reduce(x)
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather_last(self, x: Tensor) -> Tensor:
        """The ranks' parts [num_rows, n] side by side as [num_rows, size · n], on every rank."""
        if self.size == 1:
            return x
        if self._shared is not None:
            parts = self._shared.gather(x)
        else:
            parts = torch.empty(self.size * len(x), x.shape[1], dtype=x.dtype, device=x.device)
            dist.all_gather_into_tensor(parts, x.contiguous())
        return parts.view(self.size, len(x), -1).transpose(0, 1).flatten(1)

    def broadcast(self, x: Tensor, source: int) -> None:
        """x becomes what it is on the rank `source`."""
        if self.size > 1:
            dist.broadcast(x, source)

    def gather_flags(self, flag: bool) -> list[bool]:
        """The ranks' flags, on every rank."""
        if self.size == 1:
            return [flag]
        flags = torch.zeros(self.size, dtype=torch.int32, device=self._device)
        flags[self.rank] = int(flag)
        return [bool(value) for value in self.all_reduce(flags).tolist()]

    def smallest(self, value: int) -> int:
        """The smallest of the ranks' values, on every rank."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.int64, device=self._device)
        dist.all_reduce(shared, dist.ReduceOp.MIN)
        return int(shared)

    def close(self) -> None:
        if self._shared is not None:
            self._shared.close()
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


class HeadLayout:
    """What one rank holds of a decoder of this shape. Where there are fewer KV heads than ranks each is held
    by several.

    Raises ValueError, with the numbers, for head counts that do not divide.
    """

    def __init__(self, info: TextInfo, rank: int, size: int) -> None:
        if info.num_heads % size:
            raise ValueError(f"tp {size} does not divide the model's {info.num_heads} attention heads")
        if info.num_kv_heads % size and size % info.num_kv_heads:
            raise ValueError(
                f"tp {size} and the model's {info.num_kv_heads} KV heads do not divide one another"
            )
        if info.has_dense_mlps and info.intermediate_size % size:
            raise ValueError(
                f"tp {size} does not divide the model's intermediate size {info.intermediate_size}"
            )
        self.num_heads = info.num_heads // size
        self.num_kv_heads = max(1, info.num_kv_heads // size)
        self.head_dim = info.head_dim
        first_kv = rank * info.num_kv_heads // size
        self.query = Shard.split(info.num_heads * info.head_dim, rank, size)
        part = slice(first_kv * info.head_dim, (first_kv + self.num_kv_heads) * info.head_dim)
        self.kv = Shard((part,), size=info.num_kv_heads * info.head_dim)
        self.mlp = Shard.split(info.intermediate_size, rank, size) if info.has_dense_mlps else WHOLE
        self.vocab = Shard.split_padded(info.vocab_size, rank, size)


def share_experts(
    num_experts: int, hidden_size: int, intermediate_size: int, parallel: TensorParallel
) -> ExpertsShard:
    """What one rank holds of the experts of a layer. `intermediate_size`: of each expert.

    Raises ValueError, with the numbers, for what the ranks do not divide.
    """
    rank, size = parallel.rank, parallel.size
    sizes = num_experts, hidden_size, intermediate_size
    if parallel.has_whole_experts:
        if num_experts % size:
            raise ValueError(f"tp {size} does not divide the model's {num_experts} experts")
        count = num_experts // size
        return ExpertsShard(
            *sizes, range(rank * count, (rank + 1) * count), Shard.split(intermediate_size, 0, 1)
        )
    if intermediate_size % size:
        raise ValueError(
            f"tp {size} does not divide the intermediate size {intermediate_size} of the model's experts"
        )
    return ExpertsShard(*sizes, range(num_experts), Shard.split(intermediate_size, rank, size))
