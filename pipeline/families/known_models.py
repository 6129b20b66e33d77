"""Sizes of published models, by which `launcher/doctor` tells what fits a machine. Counted from their
`config.json` with transformers' classes; of the towers and decoders, without the heads that guess tokens."""

from __future__ import annotations

from typing import NamedTuple


class KnownModel(NamedTuple):
    name: str
    num_params: float  # 10⁶, tower included
    num_kept: float  # 10⁶ of them that are never quantised: the table of embeddings
    kv_bytes: int  # of a token, in 16 bits


KNOWN_MODELS = (
    KnownModel("Qwen3.5-0.8B", 853, 254, 12_288),
    KnownModel("Qwen3-VL-2B", 2128, 311, 114_688),
    KnownModel("Qwen2-VL-2B", 2209, 233, 28_672),
    KnownModel("Qwen2.5-VL-3B", 3755, 311, 36_864),
    KnownModel("Qwen3-VL-4B", 4438, 389, 147_456),
    KnownModel("Qwen2-VL-7B", 8291, 545, 57_344),
    KnownModel("Qwen2.5-VL-7B", 8292, 545, 57_344),
    KnownModel("Qwen3-VL-8B", 8767, 622, 147_456),
    KnownModel("Qwen3.5-9B", 9410, 1017, 32_768),
    KnownModel("Qwen3.5-27B", 27_357, 1271, 65_536),
    KnownModel("Qwen3-VL-30B-A3B", 31_071, 311, 98_304),
    KnownModel("Qwen3-VL-32B", 33_357, 778, 262_144),
    KnownModel("Qwen2.5-VL-32B", 33_453, 779, 262_144),
    KnownModel("Qwen3.5-35B-A3B", 35_107, 509, 20_480),
    KnownModel("Qwen2.5-VL-72B", 73_411, 1246, 327_680),
    KnownModel("Qwen3-VL-235B-A22B", 235_670, 622, 192_512),
)
