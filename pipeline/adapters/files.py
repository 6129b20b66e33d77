"""One adapter: its layers, by the names and shapes of its tensors, and what does not fit a checkpoint.

PEFT names the two tensors of a layer after the layer's path in transformers' model, which is another one in
older versions:

    base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight    [rank, in]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight                   [out, rank]

Every tensor of the file is served, or refused by its name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.adapters.settings import SETTINGS, AdapterSettings, read_settings
from pipeline.adapters.tensors import StoredTensor, check_whole, read_header, tensors_of, usual_name

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
TOWER = "visual."  # of the layers that encode pictures, by their usual names
DTYPES = ("F32", "F16", "BF16")
PACKED = ("U8", "I32", "U32", "I64")  # of a weight: of several numbers in one
# Layers that are computed for other rows than a step has, by the ends of their names.
UNSERVED = {"experts": r"\.experts(\.|$)", "input and output embeddings": r"(^|\.)(embed_tokens|lm_head)$"}


class AdaptedModule(NamedTuple):
    """A layer to which scale · B · A is added: the tensors' names in the file, and its sizes."""

    a: str
    b: str
    rank: int
    scale: float
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    name: str
    folder: Path
    digest: bytes  # of what the files are: an adapter with other files has another one
    modules: Mapping[str, AdaptedModule]  # by usual name

    @property
    def path(self) -> Path:
        return self.folder / WEIGHTS

    @property
    def tower_key(self) -> bytes:
        """What embeddings of pictures depend on: the digest, or nothing where the tower is the base's."""
        return self.digest if self.adapts_tower else b""

    @property
    def adapts_tower(self) -> bool:
        return any(module.startswith(TOWER) for module in self.modules)

    def check_fits(self, base: Mapping[str, StoredTensor]) -> None:
        """`base`: the checkpoint's tensors, by usual name. Raises ValueError, naming the tensor at fault."""
        for name, module in self.modules.items():
            stored = base.get(f"{name}.weight")
            if stored is None and not any(other.startswith(f"{name}.") for other in base):
                raise ValueError(f"{self._of(module.a)}, but the model has no layer {name}")
            if stored is None or stored.dtype in PACKED:  # its worker compares the sizes
                continue
            if len(stored.shape) != 2:
                raise ValueError(f"{self._of(module.a)}, but {name} of the model is no linear layer")
            if stored.shape != (module.out_features, module.in_features):
                sizes = f"{module.out_features} outputs of {module.in_features} inputs"
                found = f"{stored.shape[0]} of {stored.shape[1]}"
                raise ValueError(f"{self._of(module.b)} for {sizes}, but {name} of the model has {found}")

    def _of(self, tensor: str) -> str:
        return f"adapter {self.name!r} has the tensor {tensor}"


def read_adapter(name: str, folder: Path) -> Adapter:
    """Raises ValueError, with the adapter's name and folder, for files that are missing or not served."""
    try:
        return _read(name, folder)
    except (ValueError, OSError) as error:
        raise ValueError(f"adapter {name!r} in {str(folder)!r}: {error}") from None


def _read(name: str, folder: Path) -> Adapter:
    if not folder.is_dir():
        raise ValueError("this is no folder")
    settings, path = read_settings(folder), folder / WEIGHTS
    if not path.is_file():
        other = " (adapter_model.bin is not read: save it as safetensors)"
        raise ValueError(f"there is no {WEIGHTS}{other if (folder / 'adapter_model.bin').is_file() else ''}")
    header = read_header(path)
    check_whole(path, header)
    modules = _modules_of(tensors_of(path, header), settings)
    stat = path.stat()
    content = (folder / SETTINGS).read_bytes(), header, stat.st_ino, stat.st_size, stat.st_mtime_ns
    digest = hashlib.blake2b(repr(content).encode(), digest_size=16).digest()
    return Adapter(name=name, folder=folder, digest=digest, modules=modules)


def _modules_of(
    tensors: Mapping[str, StoredTensor], settings: AdapterSettings
) -> Mapping[str, AdaptedModule]:
    if not tensors:
        raise ValueError(f"{WEIGHTS} has no tensors")
    modules: dict[str, AdaptedModule] = {}
    for tensor in sorted(tensors):
        path, kind = tensor.removeprefix(PREFIX), tensor[-len(A) :]
        if not tensor.startswith(PREFIX) or kind not in (A, B):
            raise ValueError(f"the tensor {tensor} is not one of those that are served, lora_A and lora_B")
        module = path.removesuffix(kind)
        if kinds := [what for what, pattern in UNSERVED.items() if re.search(pattern, module)]:
            raise ValueError(f"the tensor {tensor}: adapters of {kinds[0]} are not served")
        if not settings.is_target(module):
            raise ValueError(f"the tensor {tensor} is of a layer that target_modules does not name")
        other = tensor.removesuffix(kind) + (A if kind == B else B)
        if other not in tensors:
            raise ValueError(f"the tensor {tensor} has no {other} beside it")
        if kind == A:
            if usual_name(module) in modules:
                raise ValueError(f"the tensor {tensor} is there twice, under two names of its layer")
            modules[usual_name(module)] = _module_of(tensor, other, module, tensors, settings)
    return modules


def _module_of(
    a: str, b: str, module: str, tensors: Mapping[str, StoredTensor], settings: AdapterSettings
) -> AdaptedModule:
    for name in (a, b):
        shape, dtype = tensors[name]
        if len(shape) != 2:
            raise ValueError(f"the tensor {name} has {len(shape)} axes, not two: it is of no linear layer")
        if dtype not in DTYPES:
            raise ValueError(f"the tensor {name} is stored as {dtype}, not as one of {', '.join(DTYPES)}")
    (rank, in_features), (out_features, other_rank) = tensors[a].shape, tensors[b].shape
    if not rank == other_rank == settings.rank_of(module):
        said = settings.rank_of(module)
        raise ValueError(
            f"the tensors {a} and {b} have the ranks {rank} and {other_rank}, {SETTINGS} says {said}"
        )
    return AdaptedModule(a, b, rank, settings.scale_of(module), out_features, in_features)
