"""FP8: numbers of type e4m3, with a scale for each block of 128 outputs and 128 inputs, as Qwen's own FP8
checkpoints have them; or one for all of a matrix.

    weight            float8_e4m3fn [out, in]
    weight_scale_inv  float32 or bfloat16 [⌈out / 128⌉, ⌈in / 128⌉]  weight = number · scale, despite its name

Experts are stored one by one, or stacked: `gate_up_proj` [experts, …] with `gate_up_proj_scale_inv`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from workers.nn.loader import Checkpoint
from workers.nn.weights.exceptions import Names
from workers.nn.weights.matrices import ScaledMatrix, StoredMatrix
from workers.nn.weights.stored import StoredFormat

SCALES = ("weight_scale_inv", "weight_scale")


class Fp8(StoredFormat):
    name: ClassVar[str] = "fp8"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        block = settings.get("weight_block_size")
        self._blocks = [] if block is None else [(int(block[0]), int(block[1]))]
        listed = settings.get("modules_to_not_convert") or settings.get("ignored_layers") or ()
        self._exceptions = Names([*listed, "lm_head"])

    def matrix(self, checkpoint: Checkpoint, module: str) -> StoredMatrix:
        scale = next((name for name in SCALES if checkpoint.has(f"{module}.{name}")), SCALES[0])
        return ScaledMatrix(checkpoint, f"{module}.weight", f"{module}.{scale}", self._blocks)

    def stacked(self, checkpoint: Checkpoint, name: str, at: int, is_transposed: bool) -> StoredMatrix:
        return ScaledMatrix(
            checkpoint, name, f"{name}_scale_inv", self._blocks, at=at, is_transposed=is_transposed
        )

    def says(self, module: str) -> bool | None:
        return not self._exceptions.match(module)
