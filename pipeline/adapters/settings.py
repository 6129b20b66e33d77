"""`adapter_config.json`: which layers an adapter changes, and how much.

A setting that would change what a layer computes, and is not served, is refused by its name; so is a setting
that nobody here knows, unless it is off.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
SETTINGS = "adapter_config.json"
ALL_LINEAR = "all-linear"
# These say how an adapter was made, or belong to a setting that is refused itself.
IGNORED = (
    "alora_invocation_string", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
    "inference_mode", "lora_dropout", "lora_ga_config", "loftq_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
)  # fmt: skip
READ = (
    "alpha_pattern", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "peft_type", "r", "rank_pattern", "target_modules", "use_rslora",
)  # fmt: skip
# Why a setting is refused; others say nothing but that they are not served.
REASONS = {
    "use_dora": "DoRA also scales the base's weights: merge this adapter into its base",
    "modules_to_save": "whole layers were trained: merge this adapter into its base",
    "bias": "biases were trained: merge this adapter into its base, or train with bias none",
    "lora_bias": "biases were trained: merge this adapter into its base",
    "fan_in_fan_out": "no layer of these models has its weight transposed",
    "target_parameters": "experts are one tensor for a layer, of which no adapters are served: merge it",
    "trainable_token_indices": "embeddings of tokens were trained: merge this adapter into its base",
}
# Of these starts the base's weights stay what they are. The others take a part out of them.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSettings:
    """Modules are named as in the file of the adapter's tensors, without `base_model.model.`."""

    rank: int
    alpha: float
    has_root_scale: bool = False  # rsLoRA
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: str | Sequence[str]  # a regular expression, or the ends of names
    excluded: str | Sequence[str] = ()
    layers: Sequence[int] | None = None
    layers_pattern: Sequence[str] = ()

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """By which B · A · x is multiplied."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.has_root_scale else rank)

    def is_target(self, module: str) -> bool:
        """As PEFT decides it."""
        if _is_named(self.excluded, module):
            return False
        if self.targets == ALL_LINEAR:
            return True
        if not _is_named(self.targets, module):
            return False
        return isinstance(self.targets, str) or self.layers is None or self._layer_of(module) in self.layers

    def _layer_of(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            if match := re.match(pattern, module):
                return int(match[1])
        return None


def read_settings(folder: Path) -> AdapterSettings:
    """Raises ValueError, naming the key, for what is missing or not served."""
    path = folder / SETTINGS
    if not path.is_file():
        raise ValueError(f"there is no {SETTINGS}")
    try:
        found: Any = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{SETTINGS} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{SETTINGS} is no object")
    if found.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {found.get('peft_type')!r}, only 'LORA' is served")
    _refuse_unserved(found)
    targets = found.get("target_modules")
    if not targets:
        raise ValueError("target_modules names no layer")
    layers = found.get("layers_to_transform")
    settings = AdapterSettings(
        rank=_number(found, "r", int),
        alpha=_number(found, "lora_alpha", int, float),
        has_root_scale=bool(found.get("use_rslora")),
        rank_pattern=_pattern(found, "rank_pattern", int),
        alpha_pattern=_pattern(found, "alpha_pattern", int, float),
        targets=_names(found, "target_modules"),
        excluded=_names(found, "exclude_modules"),
        layers=None if layers in (None, []) else [layers] if isinstance(layers, int) else list(layers),
        layers_pattern=_listed(_names(found, "layers_pattern")),
    )
    _check_expressions(settings)
    return settings


def _refuse_unserved(found: Mapping[str, Any]) -> None:
    start = found.get("init_lora_weights")
    if start not in STARTS:
        raise ValueError(
            f"init_lora_weights is {start!r}, which takes a part out of the base's weights: save the adapter "
            "with PEFT's path_initial_model_for_weight_conversion"
        )
    for key, value in found.items():
        if key in (*IGNORED, *READ) or not value or (key, value) == ("bias", "none"):
            continue
        raise ValueError(f"{key} is {value!r}: {REASONS.get(key, 'this setting is not served')}")


def _check_expressions(settings: AdapterSettings) -> None:
    both = settings.targets, settings.excluded
    single = [value for value in both if isinstance(value, str)]
    for expression in (*single, *settings.rank_pattern, *settings.alpha_pattern, *settings.layers_pattern):
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(f"{expression!r} is no regular expression: {error}") from None


def _number(found: Mapping[str, Any], key: str, *kinds: type) -> Any:
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not isinstance(value, kinds):
        raise ValueError(f"{key} is {value!r}, which is not a number of its kind")
    if not value > 0:
        raise ValueError(f"{key} is {value!r}, which is not above 0")
    return value


def _pattern(found: Mapping[str, Any], key: str, *kinds: type) -> Mapping[str, Any]:
    value = found.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r}, which is no object")
    return {name: _number(value, name, *kinds) for name in value}


def _names(found: Mapping[str, Any], key: str) -> str | Sequence[str]:
    value = found.get(key) or ()
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{key} is {value!r}, which is neither a text nor a list of names")
    return tuple(value)


def _listed(names: str | Sequence[str]) -> Sequence[str]:
    return (names,) if isinstance(names, str) else names


def _is_named(names: str | Sequence[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, T], module: str, usual: T) -> T:
    """The value of the first pattern that is the end of the module's name."""
    return next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), usual
    )  # fmt: skip
