"""Blocks of memory that another process can map: memory files on the host, or allocations on a GPU."""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.wire.errors import PipelineError
from pipeline.wire.handles import ITEM_SIZES

if TYPE_CHECKING:
    import torch


class Memory(Protocol):
    """One mapped block."""

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor: ...

    def copy_to(self, out: torch.Tensor, offset: int) -> None:
        """Fills the contiguous `out`, in order with the work on its stream."""

    def read(self, offset: int, nbytes: int) -> bytes: ...

    def write(self, offset: int, data: bytes | memoryview) -> None: ...

    def close(self) -> None: ...


class HostMemory:
    """A shared mapping of a memory file; `buffer` is readable and writable by both sides."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self._map = mmap.mmap(fd, nbytes)
        self.buffer = memoryview(self._map)

    def array(self, offset: int, shape: tuple[int, ...], dtype: str = "uint8") -> npt.NDArray[Any]:
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(self._map, dtype=dtype, count=count, offset=offset).reshape(shape)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        import torch

        count = int(np.prod(shape, dtype=np.int64))
        return torch.frombuffer(self._map, dtype=getattr(torch, dtype), count=count, offset=offset).view(
            shape
        )

    def copy_to(self, out: torch.Tensor, offset: int) -> None:
        """To a GPU asynchronously: the reader keeps its lease until the step has ended."""
        out.copy_(
            self.tensor(offset, tuple(out.shape), str(out.dtype).removeprefix("torch.")), non_blocking=True
        )

    @property
    def address(self) -> int:
        return int(np.frombuffer(self._map, dtype="uint8").ctypes.data)

    def read(self, offset: int, nbytes: int) -> bytes:
        return bytes(self.buffer[offset : offset + nbytes])

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self.buffer[offset : offset + len(data)] = data

    def close(self) -> None:
        self.buffer.release()
        # tensors may still view the mapping: it ends with the last of them
        with contextlib.suppress(BufferError):
            self._map.close()


class LockedMemory(HostMemory):
    """A page-locked shared mapping: a GPU copies from it asynchronously."""

    def __init__(self, fd: int, nbytes: int, runtime: CudaRuntime) -> None:
        super().__init__(fd, nbytes)
        self._runtime = runtime
        runtime.lock_pages(self.address, nbytes)

    def close(self) -> None:
        self._runtime.unlock_pages(self.address)
        super().close()


class CudaRuntime(Protocol):
    """The calls of `cuda.bindings.runtime` that pools need; tests use a fake."""

    def malloc(self, device: int, nbytes: int) -> int: ...

    def free(self, pointer: int) -> None: ...

    def get_ipc_handle(self, pointer: int) -> bytes: ...

    def open_ipc_handle(self, device: int, handle: bytes) -> int: ...

    def close_ipc_handle(self, pointer: int) -> None: ...

    def device_uuid(self, device: int) -> str: ...

    def tensor(self, device: int, pointer: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor: ...

    def copy(self, out: torch.Tensor, pointer: int) -> None: ...

    def read(self, pointer: int, nbytes: int) -> bytes: ...

    def write(self, pointer: int, data: bytes) -> None: ...

    def lock_pages(self, address: int, nbytes: int) -> None: ...

    def unlock_pages(self, address: int) -> None: ...


class CudaBindings:
    """`CudaRuntime` on the real library. Never run on a GPU so far: its tests are marked `gpu`."""

    def __init__(self) -> None:
        from cuda.bindings import runtime  # type: ignore[import-not-found,unused-ignore]

        self._runtime = runtime

    def _check(self, result: tuple[Any, ...], call: str) -> Any:
        if int(result[0]) != 0:
            raise PipelineError(f"{call} failed: {result[0]!r}")
        return result[1] if len(result) > 1 else None

    def malloc(self, device: int, nbytes: int) -> int:
        self._check(self._runtime.cudaSetDevice(device), "cudaSetDevice")
        return int(self._check(self._runtime.cudaMalloc(nbytes), "cudaMalloc"))

    def free(self, pointer: int) -> None:
        self._check(self._runtime.cudaFree(pointer), "cudaFree")

    def get_ipc_handle(self, pointer: int) -> bytes:
        return bytes(self._check(self._runtime.cudaIpcGetMemHandle(pointer), "cudaIpcGetMemHandle").reserved)

    def open_ipc_handle(self, device: int, handle: bytes) -> int:
        self._check(self._runtime.cudaSetDevice(device), "cudaSetDevice")
        struct = self._runtime.cudaIpcMemHandle_t()
        struct.reserved = handle
        lazy_peer_access = 1  # cudaIpcMemLazyEnablePeerAccess, the only flag there is, and mandatory
        return int(
            self._check(self._runtime.cudaIpcOpenMemHandle(struct, lazy_peer_access), "cudaIpcOpenMemHandle")
        )

    def close_ipc_handle(self, pointer: int) -> None:
        self._check(self._runtime.cudaIpcCloseMemHandle(pointer), "cudaIpcCloseMemHandle")

    def device_uuid(self, device: int) -> str:
        properties = self._check(self._runtime.cudaGetDeviceProperties(device), "cudaGetDeviceProperties")
        return bytes(properties.uuid.bytes).hex()  # copied: the bytes lie in `properties`

    def tensor(self, device: int, pointer: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        import torch

        count = int(np.prod(shape, dtype=np.int64)) * ITEM_SIZES[dtype]
        block = _CudaArray({"shape": (count,), "typestr": "|u1", "data": (pointer, False), "version": 3})
        return torch.as_tensor(block, device=f"cuda:{device}").view(getattr(torch, dtype)).view(shape)

    def copy(self, out: torch.Tensor, pointer: int) -> None:
        """Copied by the driver: torch would open a context on the peer GPU, which takes memory there."""
        import torch

        stream = torch.cuda.current_stream(out.device).cuda_stream
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault
        self._check(
            self._runtime.cudaMemcpyAsync(out.data_ptr(), pointer, out.nbytes, kind, stream),
            "cudaMemcpyAsync",
        )

    def read(self, pointer: int, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        address = np.frombuffer(data, dtype=np.uint8).ctypes.data
        self._check(
            self._runtime.cudaMemcpy(
                address, pointer, nbytes, self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
            ),
            "cudaMemcpy",
        )
        return bytes(data)

    def write(self, pointer: int, data: bytes) -> None:
        source = np.frombuffer(data, dtype=np.uint8)
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._check(self._runtime.cudaMemcpy(pointer, source.ctypes.data, len(data), kind), "cudaMemcpy")

    def lock_pages(self, address: int, nbytes: int) -> None:
        self._check(self._runtime.cudaHostRegister(address, nbytes, 0), "cudaHostRegister")

    def unlock_pages(self, address: int) -> None:
        self._check(self._runtime.cudaHostUnregister(address), "cudaHostUnregister")


class _CudaArray:
    """`__cuda_array_interface__`: the protocol by which torch accepts foreign device memory."""

    def __init__(self, interface: dict[str, object]) -> None:
        self.__cuda_array_interface__ = interface


class CudaMemory:
    """Device memory at `pointer`: the producer's own allocation, or a consumer's mapping of it."""

    def __init__(self, runtime: CudaRuntime, device: int, pointer: int, owned: bool) -> None:
        self._runtime, self._device, self._pointer, self._owned = runtime, device, pointer, owned

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return self._runtime.tensor(self._device, self._pointer + offset, shape, dtype)

    def copy_to(self, out: torch.Tensor, offset: int) -> None:
        self._runtime.copy(out, self._pointer + offset)

    def read(self, offset: int, nbytes: int) -> bytes:
        return self._runtime.read(self._pointer + offset, nbytes)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self._runtime.write(self._pointer + offset, bytes(data))

    def close(self) -> None:
        if self._owned:
            self._runtime.free(self._pointer)
        else:
            self._runtime.close_ipc_handle(self._pointer)


def create_memory_file(name: str, nbytes: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, nbytes)
    return fd
