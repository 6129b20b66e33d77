"""Finds the formats of a checkpoint's weights, by its `quantization_config` or the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.families.quantization import CHECKS, check_quantization, stored_quantization
from workers.nn.loader import Checkpoint, Progress, no_progress
from workers.nn.weights.adapters import AdapterSet
from workers.nn.weights.at_load import GroupedAtLoad
from workers.nn.weights.auto_round import auto_round
from workers.nn.weights.awq import Awq
from workers.nn.weights.base import Activations, Format
from workers.nn.weights.compressed_tensors import CompressedTensors
from workers.nn.weights.dense import Dense
from workers.nn.weights.fp8 import Fp8
from workers.nn.weights.gptq import Gptq
from workers.nn.weights.grouped import NumberKind
from workers.nn.weights.int4 import Int4
from workers.nn.weights.int8 import Int8
from workers.nn.weights.modelopt import ModelOpt
from workers.nn.weights.stored import StoredFormat
from workers.nn.weights.weights import Weights

# From a `quantization_config`, which `check_quantization` has seen, to its format.
ReadFormat = Callable[[Mapping[str, Any]], Format]

# By `quant_method`: formats of checkpoints.
STORED_FORMATS: Mapping[str, ReadFormat] = {
    "fp8": Fp8,
    "awq": Awq,
    "gptq": Gptq,
    "auto-round": auto_round,
    "compressed-tensors": CompressedTensors,
    "modelopt": ModelOpt,
}


def _int8(has_small_activations: bool) -> Format:
    return Int8() if has_small_activations else GroupedAtLoad(NumberKind.INT8)


def _int4(has_small_activations: bool) -> Format:
    return Int4() if has_small_activations else GroupedAtLoad(NumberKind.INT4)


def _fp8(has_small_activations: bool) -> Format:
    return GroupedAtLoad(NumberKind.FP8)


# By the options `--quantization` and `--vit-quantization`: formats that are made from dense weights at load.
# Whether activations may be in 8 bits, which is where a CPU has layouts of its own.
MADE_FORMATS: Mapping[str, Callable[[bool], Format]] = {"int8": _int8, "int4": _int4, "fp8": _fp8}


def choose_formats(
    folder: Path,
    device: torch.device,
    override: str = "none",
    stored: Mapping[str, ReadFormat] = STORED_FORMATS,
    dense: Format | None = None,
    activations: str = "auto",
) -> Sequence[Format]:
    """For `Weights`: the checkpoint's format, and one for the layers that it does not hold.

    `override`: the option `--quantization` or `--vit-quantization`. `dense`: the format of unquantised
    layers; the export to ONNX gives one that torch can trace, and gets quantised ones dequantised.
    `activations`: the option `--activation-quantization`, which dense weights do not heed: the launcher
    refuses it where nothing is quantised. Raises ValueError for a format that is unknown, or does not compute
    on the device, or not with such activations.
    """
    wanted = Activations(activations)
    format = _stored_format(folder, stored)
    if dense is not None and isinstance(format, StoredFormat):
        format.export(dense)
    dense = dense or Dense()
    if override != "none":
        if format is not None:
            found = f"{str(folder)!r} has {format.name}"
            raise ValueError(f"quantization {override!r} is for dense weights, but {found}")
        format = MADE_FORMATS[override](device.type == "cpu" and wanted is not Activations.NONE)
    if format is None:
        return (dense,)
    format.choose_activations(wanted)
    if wanted is Activations.INT8 and device.type != "cpu":
        raise ValueError(
            f"activation_quantization 'int8' is for the CPU, but this worker computes on {device}"
        )
    format.check_device(device)
    return format, dense


def open_weights(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    override: str = "none",
    progress: Progress = no_progress,
    dense: Format | None = None,
    adapters: AdapterSet | None = None,
    activations: str = "auto",
) -> Weights:
    """The checkpoint in `folder`, in its formats, with `adapters` beside its layers; other tensors in
    `dtype`.

    Raises ValueError as `choose_formats` does.
    """
    formats = choose_formats(folder, device, override, dense=dense, activations=activations)
    return Weights(Checkpoint(folder, dtype, device, progress), formats, adapters=adapters)


def _stored_format(folder: Path, stored: Mapping[str, ReadFormat]) -> Format | None:
    found = stored_quantization(folder)
    if found is None:
        return None
    if found.method not in stored or found.method in CHECKS:
        check_quantization(folder)
    return stored[found.method](found.settings)
