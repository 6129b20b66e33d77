"""compressed-tensors, which llm-compressor writes: several formats, also in one file.

    pack-quantized    weight_packed int32 [out, in · bits / 32], signed numbers plus their offset, in order;
                      weight_shape [2]; perhaps weight_g_idx [in], the group of each input
    int-quantized     weight int8 [out, in]
    float-quantized   weight float8_e4m3fn [out, in]

with `weight_scale`, one for a matrix, for each output [out, 1], for groups [out, in / group] or for blocks;
and perhaps `weight_zero_point`, as numbers are stored, but packed along the outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from workers.nn.loader import Checkpoint
from workers.nn.weights.exceptions import Names
from workers.nn.weights.matrices import ScaledMatrix, StoredMatrix, expect_type
from workers.nn.weights.packed import KINDS, as_kind, put_blocks, unpack, without_common, words_of
from workers.nn.weights.stored import StoredFormat

logger = logging.getLogger(__name__)


class CompressedMatrix(StoredMatrix):
    def __init__(self, checkpoint: Checkpoint, module: str, group_sizes: Iterable[int] = ()) -> None:
        """`group_sizes`: by the settings. The first that fits counts where the last group is shorter."""
        name = f"{module}.weight_packed"
        expect_type(checkpoint, name, "I32")
        expect_type(checkpoint, f"{module}.weight_shape", "I64", "I32")
        self._checkpoint, self._module = checkpoint, module
        out_features, in_features = checkpoint.read(f"{module}.weight_shape").tolist()
        packed, scales = checkpoint.shape(name), checkpoint.shape(f"{module}.weight_scale")
        fitting = [bits for bits in KINDS if packed == (out_features, -(-in_features * bits // 32))]
        num_groups = scales[1] if len(scales) == 2 and scales[0] == out_features else 0
        if not fitting or not num_groups:
            raise ValueError(
                f"{module} is not packed as 4 or 8 bits: weight_packed has the shape {packed}, weight_scale "
                f"{scales}, weight_shape says {(out_features, in_features)}"
            )
        self._bits = fitting[0]
        groups = self._find_groups(in_features, num_groups, group_sizes)
        super().__init__(name, KINDS[self._bits], (out_features, in_features), groups)

    def _find_groups(self, in_features: int, num_groups: int, group_sizes: Iterable[int]) -> Tensor:
        name = f"{self._module}.weight_g_idx"
        if self._checkpoint.has(name):
            found = self._checkpoint.read(name).long()
            if len(found) == in_features and 0 <= int(found.min()) <= int(found.max()) < num_groups:
                return found
            if bool((found >= 0).any()):
                raise ValueError(f"tensor {name!r} does not fit {in_features} inputs in {num_groups} groups")
        for size in group_sizes:
            if num_groups == -(-in_features // size):
                return torch.arange(in_features) // size
        if in_features % num_groups:
            raise ValueError(
                f"{self._module} has {in_features} inputs, which {num_groups} groups do not divide"
            )
        return torch.arange(in_features) // (in_features // num_groups)

    def numbers(self, rows: slice, columns: slice) -> Tensor:
        words, within = words_of(columns, self._bits)
        found = self._checkpoint.read(self.name, rows, words).to(self._checkpoint.device)
        return as_kind(unpack(found, self._bits)[:, within], self._bits)

    def put_blocks(self, rows: slice, columns: slice, order: Tensor | None, out: Tensor) -> bool:
        words, _ = words_of(columns, self._bits)
        put_blocks(self._checkpoint.read(self.name, rows, words).to(self._checkpoint.device), order, out)
        return True

    def scales(self, rows: slice) -> Tensor:
        found = self._checkpoint.read(f"{self._module}.weight_scale", rows)
        return found.to(self._checkpoint.device).float()

    def zeros(self, rows: slice) -> Tensor | None:
        name = f"{self._module}.weight_zero_point"
        if not self._checkpoint.has(name):
            return None
        expect_type(self._checkpoint, name, "I32")
        words, within = words_of(rows, self._bits)
        found = self._checkpoint.read(name, words).to(self._checkpoint.device)
        zeros = unpack(found.t(), self._bits)[:, within].t().contiguous()
        return without_common(as_kind(zeros, self._bits), self.kind)


class CompressedTensors(StoredFormat):
    name: ClassVar[str] = "compressed-tensors"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self._exceptions = Names(settings.get("ignore") or ())
        self._groups = [_Group(group) for group in (settings.get("config_groups") or {}).values()]
        if settings.get("kv_cache_scheme"):
            logger.info(
                "the checkpoint's kv_cache_scheme has no effect: an option chooses the type of the KV cache"
            )

    def matrix(self, checkpoint: Checkpoint, module: str) -> StoredMatrix:
        names = [f"{module}.{name}" for name in ("weight", "weight_scale", "weight_zero_point")]
        if checkpoint.has(f"{module}.weight_packed"):
            return CompressedMatrix(checkpoint, module, [size for _, size in self._blocks(module)])
        return ScaledMatrix(checkpoint, names[0], names[1], list(self._blocks(module)), zero=names[2])

    def _blocks(self, module: str) -> Iterator[tuple[int, int]]:
        """Of the groups whose layers this is one of, then of the others."""
        for group in sorted(self._groups, key=lambda group: not group.match(module)):
            yield from group.blocks

    def says(self, module: str) -> bool | None:
        return not self._exceptions.match(module) and any(group.match(module) for group in self._groups)


class _Group:
    """Layers with the same settings."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        targets = group.get("targets") or ()
        self._has_classes = any(_is_class(target) for target in targets)
        self._names = Names([target for target in targets if not _is_class(target)])
        weights: Mapping[str, Any] = group.get("weights") or {}
        self.blocks: list[tuple[int, int]] = []
        if weights.get("block_structure"):
            rows, columns = weights["block_structure"]
            self.blocks.append((int(rows), int(columns)))
        elif (weights.get("group_size") or -1) > 0:
            self.blocks.append((1, int(weights["group_size"])))

    def match(self, module: str) -> bool:
        return self._has_classes or self._names.match(module)


def _is_class(target: str) -> bool:
    return target[:1].isupper() and "." not in target
