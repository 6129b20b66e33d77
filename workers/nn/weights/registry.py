"""Finds the formats of a checkpoint's weights, by its `quantization_config` or the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from workers.nn.loader import Checkpoint, Progress, no_progress
from workers.nn.weights.base import Activations, Format
from workers.nn.weights.dense import Dense
from workers.nn.weights.int4 import Int4
from workers.nn.weights.int8 import Int8
from workers.nn.weights.weights import Weights

# From a `quantization_config` to its format. Raises ValueError for an unknown variant.
ReadFormat = Callable[[Mapping[str, object]], Format]

# By `quant_method`: formats of checkpoints.
STORED_FORMATS: Mapping[str, ReadFormat] = {}
# By the options `--quantization` and `--vit-quantization`: formats that are made from dense weights at load.
MADE_FORMATS: Mapping[str, Callable[[], Format]] = {"int8": Int8, "int4": Int4}


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
    layers; the export to ONNX gives one that torch can trace. `activations`: the option
    `--activation-quantization`. Raises ValueError for a format that is unknown, or does not compute on the
    device, or not with such activations.
    """
    format, dense = _stored_format(folder, stored), dense or Dense()
    if override != "none":
        if format is not None:
            found = f"{str(folder)!r} has {format.name}"
            raise ValueError(f"quantization {override!r} is for dense weights, but {found}")
        format = MADE_FORMATS[override]()
    wanted = Activations(activations)
    (format or dense).choose_activations(wanted)
    if format is None:
        return (dense,)
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
    activations: str = "auto",
) -> Weights:
    """The checkpoint in `folder`, in its formats; other tensors in `dtype`.

    Raises ValueError as `choose_formats` does.
    """
    formats = choose_formats(folder, device, override, dense=dense, activations=activations)
    return Weights(Checkpoint(folder, dtype, device, progress), formats)


def _stored_format(folder: Path, stored: Mapping[str, ReadFormat]) -> Format | None:
    config = _quantization_config(folder)
    if config is None:
        return None
    method = str(config.get("quant_method"))
    if method not in stored:
        known = f"known are {', '.join(sorted(stored))}" if stored else "only dense weights are served"
        what = f"are quantised by {method!r}: {known}"
        raise ValueError(
            f"the weights of model {str(folder)!r} {what} (key quantization_config.quant_method)"
        )
    return stored[method](config)


def _quantization_config(folder: Path) -> Mapping[str, object] | None:
    """From `config.json`, at its top or in its text config, or from the file that ModelOpt writes instead."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    nested = config.get("text_config") or {}
    found: Mapping[str, object] | None = config.get("quantization_config") or nested.get(
        "quantization_config",
    )
    if not found and (folder / "hf_quant_config.json").is_file():
        return {"quant_method": "modelopt"}
    return found or None
