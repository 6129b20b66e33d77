"""Reads tensors out of a Hugging Face folder of safetensors, one by one, so that at most one is in memory
twice.

Knows no models, and no formats of weights (`workers/nn/weights`). Names are those of the hub's older
checkpoints (`model.layers.…`, `visual.…`); the prefixes of transformers 5 are mapped to them.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.adapters.tensors import read_header, usual_name

WITH_BFLOAT16 = (8, 0)  # compute capability: Ampere
FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PLAIN_TYPES = (*FILE_DTYPES, "F64")  # a file's types of weights that are not quantised
MAPPED_BYTES = 256 << 20  # that are read from a file before it is mapped anew: its pages count as memory
AHEAD_BYTES = 128 << 20  # that the system is asked to read from the disk behind what is being read
# Bytes of the tensors that are loaded at least in part, and of all; 0 and 1 while their number is unknown.
Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """A `Progress` that reports nothing."""


class StoredRows:
    """A matrix that stays in its file: rows are read on demand, through the system's page cache."""

    def __init__(self, path: Path, start: int, num_columns: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._path, self._file = path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self._start, self._num_columns = start, num_columns

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """[n, num_columns] in the file's dtype, for row numbers [n]."""
        size = self._num_columns * self.dtype.itemsize
        data = bytearray(len(numbers) * size)
        view = memoryview(data)
        for index, number in enumerate(numbers.tolist()):
            if (
                os.preadv(self._file, [view[index * size : (index + 1) * size]], self._start + number * size)
                != size
            ):
                raise ValueError(f"row {number} is not in {self._path.name}")
        return torch.frombuffer(data, dtype=self.dtype).view(-1, self._num_columns)


class Checkpoint:
    """The tensors of a folder, by name.

    Raises ValueError for a folder without safetensors, and for a missing tensor.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, progress: Progress = no_progress
    ) -> None:
        self.dtype, self.device = dtype, device
        self._opened: tuple[Path, safe_open] | None = None
        self._num_read = 0  # bytes, since the file was opened
        self._places: dict[str, tuple[Path, str]] = {}  # name → file, name in the file
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            for name, file in json.loads(index.read_text())["weight_map"].items():
                self._places[usual_name(name)] = (folder / file, name)
        else:
            for path in sorted(folder.glob("*.safetensors")):
                for name in self._open(path).keys():  # noqa: SIM118
                    self._places[usual_name(name)] = (path, name)
        if not self._places:
            raise ValueError(f"model {str(folder)!r} has no safetensors files")
        self._progress = progress
        # Where each file's data begin, and the entries of its header by the name in the file.
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}
        self._loaded: set[str] = set()  # tensors of which at least a part has been read
        self._done, self._total = 0, 0
        self._asked: dict[Path, range] = {}  # bytes of a file that were asked for lately

    def expect(self, prefix: str) -> None:
        """Progress counts the tensors under this prefix only."""
        self._total = sum(self._size(name) for name in self._places if name.startswith(prefix))

    def _size(self, name: str) -> int:
        start, stop = self._entry(name)["data_offsets"]
        return int(stop - start)

    def _entry(self, name: str) -> dict[str, Any]:
        """What the header of its file says of a tensor."""
        path, stored = self._place(name)
        found: dict[str, Any] = self._header(path)[1][stored]
        return found

    def _header(self, path: Path) -> tuple[int, dict[str, Any]]:
        if path not in self._headers:
            header = read_header(path)
            self._headers[path] = 8 + len(header), json.loads(header)
        return self._headers[path]

    def has(self, name: str) -> bool:
        return name in self._places

    def has_module(self, module: str) -> bool:
        """Whether there is any tensor of this layer, whatever its format."""
        return any(name.startswith(f"{module}.") for name in self._places)

    def rows(self, name: str) -> StoredRows:
        """A matrix that stays in its file."""
        self.check_plain(name)
        path, entry = self._place(name)[0], self._entry(name)
        start = self._header(path)[0] + entry["data_offsets"][0]
        return StoredRows(path, start, entry["shape"][1], FILE_DTYPES[entry["dtype"]])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name)["shape"])

    def type_of(self, name: str) -> str:
        """As safetensors calls it: `BF16`, `F8_E4M3`, `I32`."""
        return str(self._entry(name)["dtype"])

    def is_plain(self, name: str) -> bool:
        """Whether a tensor holds numbers that are weights as they are."""
        return self.type_of(name) in PLAIN_TYPES

    def check_plain(self, name: str) -> None:
        """Raises ValueError for a tensor of numbers that are no weights without their scales."""
        if not self.is_plain(name):
            raise ValueError(
                f"tensor {name!r} of the checkpoint is of type {self.type_of(name)}: it is quantised, and "
                "the checkpoint does not say how (no scales beside it, or no quantization_config)"
            )

    def load(
        self, name: str, rows: slice = slice(None), columns: slice | None = None, at: int | None = None
    ) -> Tensor:
        """A tensor or a part of it: contiguous, a copy, in the model's dtype, on its device.

        `at`: of one of the matrices that the tensor stacks. Raises ValueError for a tensor of numbers that
        are no weights without their scales.
        """
        self.check_plain(name)
        tensor = self.read(name, rows, columns, at)
        return tensor.to(
            device=self.device, dtype=self.dtype, copy=True, memory_format=torch.contiguous_format
        )

    def read(
        self, name: str, rows: slice = slice(None), columns: slice | None = None, at: int | None = None
    ) -> Tensor:
        """As `load`, but on the host, in the dtype of the file, which packed weights need. May be a view of
        the file."""
        path, stored = self._place(name)
        ranges = (*(() if at is None else (at,)), rows, *(() if columns is None else (columns,)))
        if self.shape(name):
            tensor: Tensor = self._open(path).get_slice(stored)[ranges]
        else:
            tensor = self._open(path).get_tensor(stored)
        self._num_read += tensor.nbytes
        self._ask_for_more(path, name)
        if name not in self._loaded:
            self._loaded.add(name)
            if not self._total:
                self.expect("")
            self._done = min(self._done + self._size(name), self._total)
        self._progress(self._done, self._total)
        return tensor

    def _ask_for_more(self, path: Path, name: str) -> None:
        """The disk goes on, in large pieces, while this process makes layers of what is there: what is behind
        a tensor in its file mostly is needed next."""
        start, stop = (self._header(path)[0] + offset for offset in self._entry(name)["data_offsets"])
        known = self._asked.get(path, range(0))
        if not known.start <= start <= known.stop:
            known = range(start, start)
        if stop + AHEAD_BYTES - known.stop >= AHEAD_BYTES // 2:
            self._asked[path] = range(known.start, stop + AHEAD_BYTES)
            with path.open("rb") as file:
                os.posix_fadvise(
                    file.fileno(), known.stop, stop + AHEAD_BYTES - known.stop, os.POSIX_FADV_WILLNEED
                )

    def _place(self, name: str) -> tuple[Path, str]:
        if name not in self._places:
            module = name.rpartition(".")[0]
            others = [other for other in self._places if module and other.startswith(f"{module}.")]
            beside = f", but {', '.join(sorted(others)[:4])}" if others else ""
            raise ValueError(f"the checkpoint has no tensor {name!r}{beside}")
        return self._places[name]

    def close(self) -> None:
        """Unmaps the files, whose pages count as this process's memory, and returns freed memory."""
        self._opened = None
        # glibc keeps freed blocks, here up to the size of a layer
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def _open(self, path: Path) -> safe_open:
        """Keeps one file mapped at a time, and not more of it than was read lately, since its pages count as
        this process's memory."""
        if self._opened is None or self._opened[0] != path or self._num_read > MAPPED_BYTES:
            self._opened, self._num_read = None, 0
            self._opened = path, safe_open(path, framework="pt")
        return self._opened[1]


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device has instructions for it; else float32 on a CPU, which would be
    several times slower in bfloat16, and float16 on a GPU (before Ampere).
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda":
        # The lowest capability of all GPUs: ranks and ViTs on different GPUs need one dtype.
        least = min(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
        return torch.bfloat16 if least >= WITH_BFLOAT16 else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported()
    if platform.machine() == "aarch64":
        fast = fast or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def choose_device(name: str, ordinal: int, is_shared: bool = False) -> torch.device:
    """The GPU `ordinal`; the CPU if the option says so, or says `auto` on a machine without GPUs.

    `is_shared`: `ordinal` is taken modulo the number of GPUs. Raises ValueError for a missing GPU.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if is_shared and count:
        ordinal %= count
    if ordinal >= count:
        raise ValueError(f"GPU {ordinal} is wanted, but this machine has {count}")
    device = torch.device("cuda", ordinal)
    torch.cuda.set_device(device)  # Triton and NCCL use the current device
    return device


def to_device(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """Copies a host array to a device: to a GPU asynchronously, through page-locked memory."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
