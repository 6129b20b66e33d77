"""AutoRound: its exports are packed as GPTQ or AWQ pack them, and read as these."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.families.quantization import auto_round_packing, is_expression
from workers.nn.weights.awq import Awq
from workers.nn.weights.gptq import Gptq
from workers.nn.weights.stored import StoredFormat

DENSE_BITS = 16


def auto_round(settings: Mapping[str, Any]) -> StoredFormat:
    if auto_round_packing(settings) == "awq":
        kept = [name for name, rules in _rules(settings).items() if rules.get("bits", 0) >= DENSE_BITS]
        return Awq({**settings, "modules_to_not_convert": kept or None})
    dynamic = {_dynamic(name, rules): rules for name, rules in _rules(settings).items()}
    return Gptq({**settings, "dynamic": dynamic})


def _rules(settings: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Of layers that differ from the others."""
    found: Mapping[str, Mapping[str, Any]] = settings.get("extra_config") or {}
    return found


def _dynamic(name: str, rules: Mapping[str, Any]) -> str:
    """The key by which GPTQ has the rules of a layer, whose name may be an expression."""
    expression = name if is_expression(name) else re.escape(name)
    return f"{'-' if rules.get('bits', 0) >= DENSE_BITS else '+'}:{expression}$"
