"""How a checkpoint says that its weights are quantised, and which ways are not served. Knows no tensors.

    stored_quantization(folder) → StoredQuantization | None           what `config.json` says
    check_quantization(folder)                                        ValueError, in one sentence

The launcher asks before any process starts, `workers/nn/weights/registry.py` before it reads tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.families.files import read_json

Settings = Mapping[str, Any]
INSTEAD = "take the model's FP8, AWQ, GPTQ or unquantised files instead"
PLACE = "config.json, key quantization_config"


class StoredQuantization(NamedTuple):
    method: str  # as `quant_method` has it
    settings: Settings
    place: str  # the file and the key


class QuantizationRefusal(ValueError):
    """Weights that are quantised in a way that is not served."""

    def __init__(self, folder: Path, what: str, place: str, instead: str = INSTEAD) -> None:
        super().__init__(f"the weights of model {str(folder)!r} are quantised {what} ({place}): {instead}")


def stored_quantization(folder: Path) -> StoredQuantization | None:
    """From `config.json`, at its top or in its text config, or from the file that ModelOpt writes.

    Raises ValueError for a description without a method.
    """
    config = read_json(folder / "config.json")
    nested = config.get("text_config") or {}
    places = (config, "quantization_config"), (nested, "quantization_config"), (config, "compression_config")
    settings = next((found[key] for found, key in places if found.get(key)), None)
    if not settings:
        of_modelopt = read_json(folder / "hf_quant_config.json")
        if of_modelopt:
            return StoredQuantization("modelopt", of_modelopt, "hf_quant_config.json")
    described = settings or config.get("quantization")
    if not described:
        return None
    if not isinstance(described, Mapping):
        raise QuantizationRefusal(folder, f"by {described!r}, which are no settings", PLACE)
    if not described.get("quant_method"):
        if "quant_algo" in described:
            return StoredQuantization("modelopt", described, PLACE)
        if any(str(key).startswith(("load_in_", "bnb_")) for key in described):
            return StoredQuantization("bitsandbytes", described, PLACE)
        if "quantization" in config and "bits" in described:
            raise QuantizationRefusal(folder, "by MLX, for Macs", "config.json, key quantization")
        keys = ", ".join(sorted(described))
        raise QuantizationRefusal(folder, f"by a method that nothing names, with the keys {keys}", PLACE)
    return StoredQuantization(str(described["quant_method"]), described, PLACE)


def check_quantization(folder: Path) -> StoredQuantization | None:
    """What `stored_quantization` finds. Raises ValueError where it is not served."""
    found = stored_quantization(folder)
    if found is None:
        return None
    if found.method not in CHECKS:
        names = ", ".join(sorted(CHECKS))
        reason = UNSERVED.get(found.method, "")
        instead = f"known are {names}; {INSTEAD}"
        what = f"by {found.method!r}{reason and f', {reason}'}"
        raise QuantizationRefusal(folder, what, f"{found.place}.quant_method", instead)
    refusal = _check_names(found.settings) or CHECKS[found.method](found.settings)
    if refusal is not None:
        raise QuantizationRefusal(
            folder, f"by {found.method!r} {refusal.what}", f"{found.place}.{refusal.key}"
        )
    return found


UNSERVED = {
    "bitsandbytes": "which computes on NVIDIA's GPUs only",
    "mxfp4": "numbers of 4 bits in floating point",
    "gguf": "llama.cpp's files",
    "modelopt_fp4": "numbers of 4 bits in floating point",
}


class Refusal(NamedTuple):
    what: str
    key: str


def modelopt_settings(settings: Settings) -> Settings:
    """Of either file: `hf_quant_config.json` has them under `quantization`."""
    found: Settings = settings.get("quantization") or settings
    return found


def auto_round_packing(settings: Settings) -> str:
    """`gptq` or `awq`, or empty for a packing of AutoRound's own."""
    packing = str(settings.get("packing_format", "auto_round:auto_gptq")).removeprefix("auto_round:")
    return {"auto_gptq": "gptq", "gptq": "gptq", "auto_awq": "awq", "awq": "awq"}.get(packing, "")


def format_of_group(group: Settings, settings: Settings) -> str:
    """Of compressed-tensors: with several formats in one file each group of layers says its own."""
    return str(group.get("format") or settings.get("format") or "")


def _no(settings: Settings, key: str, served: Sequence[object], default: object) -> Refusal | None:
    found = default if settings.get(key) is None else settings[key]
    if found in served:
        return None
    known = " or ".join(map(str, served))
    return Refusal(f"with {key} {found!r}, where {known} is served", key)


def _first(*found: Refusal | None) -> Refusal | None:
    return next((refusal for refusal in found if refusal is not None), None)


# Lists of layers by their names, and settings of layers by expressions, of any method.
LISTS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
BY_NAME = ("dynamic", "extra_config", "config_groups", "quantized_layers")


def _check_names(settings: Settings) -> Refusal | None:
    """A pattern that is none would match nothing, or end a worker."""
    places = [settings, *(found for found in [settings.get("quantization")] if isinstance(found, Mapping))]
    for found in places:
        for key in LISTS:
            listed = found.get(key) or []
            if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
                return Refusal(f"with {key} {listed!r}, where a list of names is served", key)
            patterns = [name.removeprefix("re:") for name in listed if name.startswith("re:")]
            if (bad := _no_expression(patterns)) is not None:
                return Refusal(f"with {bad!r} in {key}, which is no regular expression", key)
        for key in BY_NAME:
            rules = found.get(key) or {}
            if isinstance(rules, Mapping) and key == "config_groups":
                continue  # whose own check names the group
            if not isinstance(rules, Mapping) or not all(isinstance(one, Mapping) for one in rules.values()):
                return Refusal(f"with {key} {rules!r}, where settings by names are served", key)
    by_expression: Settings = settings.get("dynamic") or {}
    by_either: Settings = settings.get("extra_config") or {}
    expressions = {
        "dynamic": [name.removeprefix("+:").removeprefix("-:") for name in by_expression],
        "extra_config": [name for name in by_either if is_expression(name)],
    }
    for key, patterns in expressions.items():
        if (bad := _no_expression(patterns)) is not None:
            return Refusal(f"with {bad!r} in {key}, which is no regular expression", key)
    return None


SPECIAL = frozenset("*+?^$()[]{}|\\")  # marks of an expression


def is_expression(name: str) -> bool:
    """Of AutoRound's names of layers, which may be either."""
    return bool(set(name) & SPECIAL)


def _no_expression(patterns: Sequence[str]) -> str | None:
    """The first that is none."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error:
            return pattern
    return None


def _check_fp8(settings: Settings) -> Refusal | None:
    block = settings.get("weight_block_size")
    is_size = [isinstance(size, int) and size > 0 for size in block] if isinstance(block, list) else []
    if block is not None and is_size != [True, True]:
        return Refusal(
            f"with weight_block_size {block!r}, where a pair of sizes is served", "weight_block_size"
        )
    return _first(_no(settings, "fmt", ("e4m3",), "e4m3"), _no(settings, "scale_fmt", (None, "float"), None))


def _check_awq(settings: Settings) -> Refusal | None:
    key = "bits" if "bits" in settings else "w_bit"
    version = str(settings.get("version", "gemm")).lower()
    is_known = version == "gemm"
    return _first(
        _no(settings, key, (4,), 4),
        None if is_known else Refusal(f"with version {version!r}, where gemm is served", "version"),
    )


def _check_gptq(settings: Settings) -> Refusal | None:
    others = [
        _no(rules, "bits", (4, 8), 4)
        for pattern, rules in (settings.get("dynamic") or {}).items()
        if not str(pattern).startswith("-:")
    ]
    is_marlin = bool(settings.get("is_marlin_format"))
    return _first(
        _no(settings, "bits", (4, 8), None),
        _no(settings, "checkpoint_format", ("gptq", "gptq_v2"), "gptq"),
        Refusal("in Marlin's order of numbers", "is_marlin_format") if is_marlin else None,
        *(refusal and Refusal(refusal.what, "dynamic") for refusal in others),
    )


def _check_auto_round(settings: Settings) -> Refusal | None:
    packing, kind = auto_round_packing(settings), settings.get("data_type", "int")
    if kind != "int":
        return Refusal(f"with data_type {kind!r}, where int is served", "data_type")
    if not packing:
        found = settings.get("packing_format")
        return Refusal(
            f"with packing_format {found!r}, where auto_round:auto_gptq or auto_round:auto_awq is served",
            "packing_format",
        )
    bits = [
        settings.get("bits"),
        *(rules.get("bits") for rules in (settings.get("extra_config") or {}).values()),
    ]
    served = (4, 8, 16, 32) if packing == "gptq" else (4, 16, 32)
    other = next((one for one in bits if one is not None and one not in served), None)
    return None if other is None else Refusal(f"with bits {other!r}, where {served[0]} is served", "bits")


def _check_compressed(settings: Settings) -> Refusal | None:
    sparsity = settings.get("sparsity_config") or {}
    if sparsity and sparsity.get("format", "dense") != "dense":
        return Refusal(f"and sparse, with format {sparsity.get('format')!r}", "sparsity_config")
    if settings.get("transform_config"):
        return Refusal("behind rotations, which each layer would have to undo", "transform_config")
    if settings.get("quantization_status", "compressed") != "compressed":
        status = settings["quantization_status"]
        return Refusal(f"but not compressed: the status is {status!r}", "quantization_status")
    for name, group in (settings.get("config_groups") or {}).items():
        if not isinstance(group, Mapping):
            return Refusal(f"with a group {group!r}, which has no settings", f"config_groups.{name}")
        refusal = _check_group(group, format_of_group(group, settings), f"config_groups.{name}")
        if refusal is not None:
            return refusal
    return None


COMPRESSED_FORMATS = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "dense")


def _check_group(group: Settings, format: str, key: str) -> Refusal | None:
    weights = group.get("weights") or {}
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    if format not in COMPRESSED_FORMATS:
        known = ", ".join(COMPRESSED_FORMATS[:3])
        return Refusal(f"as {format!r}, where {known} are served", f"{key}.format")
    targets = group.get("targets") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        return Refusal(f"with targets {targets!r}, where a list of names is served", f"{key}.targets")
    expressions = [target.removeprefix("re:") for target in targets if target.startswith("re:")]
    if (bad := _no_expression(expressions)) is not None:
        return Refusal(f"with {bad!r} in targets, which is no regular expression", f"{key}.targets")
    if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
        return Refusal(
            f"with {bits} bits of type {kind!r}, where int of 4 or 8 and float of 8 are served", key
        )
    return None


MODELOPT_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")


def _check_modelopt(settings: Settings) -> Refusal | None:
    found = modelopt_settings(settings)
    key = "quant_algo" if found is settings else "quantization.quant_algo"
    algorithm = str(found.get("quant_algo"))
    if algorithm == "MIXED_PRECISION":
        layers = found.get("quantized_layers") or {}
        kinds = {str(rules.get("quant_algo")) for rules in layers.values()}
    else:
        kinds = {algorithm}
    others = sorted(kinds - set(MODELOPT_ALGORITHMS))
    served = ", ".join(MODELOPT_ALGORITHMS)
    return Refusal(f"as {others[0]}, where {served} are served", key) if others else None


# By `quant_method`.
CHECKS: Mapping[str, Callable[[Settings], Refusal | None]] = {
    "fp8": _check_fp8,
    "awq": _check_awq,
    "gptq": _check_gptq,
    "auto-round": _check_auto_round,
    "compressed-tensors": _check_compressed,
    "modelopt": _check_modelopt,
}
