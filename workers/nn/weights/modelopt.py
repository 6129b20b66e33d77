"""FP8 as NVIDIA's ModelOpt writes it.

    weight        float8_e4m3fn [out, in]
    weight_scale  float32: one for a matrix; [out] of FP8_PER_CHANNEL_PER_TOKEN; of FP8_PB_WO for blocks of
                  128 outputs and 128 inputs, [⌈out / 128⌉, 1, ⌈in / 128⌉, 1]

The settings are in `config.json` or in `hf_quant_config.json`, whose keys differ.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from pipeline.families.quantization import modelopt_settings
from workers.nn.loader import Checkpoint
from workers.nn.weights.exceptions import Names
from workers.nn.weights.matrices import ScaledMatrix, StoredMatrix
from workers.nn.weights.stored import StoredFormat

logger = logging.getLogger(__name__)
BLOCK = (128, 128)


class ModelOpt(StoredFormat):
    name: ClassVar[str] = "modelopt"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        found = modelopt_settings(settings)
        self._exceptions = Names(found.get("exclude_modules") or found.get("ignore") or ())
        if found.get("kv_cache_quant_algo") or found.get("kv_cache_scheme"):
            logger.info(
                "the checkpoint's type of KV cache has no effect: an option chooses the type of the KV cache"
            )

    def matrix(self, checkpoint: Checkpoint, module: str) -> StoredMatrix:
        return ScaledMatrix(checkpoint, f"{module}.weight", f"{module}.weight_scale", [BLOCK])

    def says(self, module: str) -> bool | None:
        return not self._exceptions.match(module)
