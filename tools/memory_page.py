"""Writes docs/memory.md: what the published models need, computed from their shapes.

python -m tools.memory_page            # a test says whether the page is up to date
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.families import read_model_info
from tools.random_checkpoint.settings import write_settings
from tools.random_checkpoint.shapes import SHAPES
from tools.random_checkpoint.weights import hub_shapes
from workers.llm.cache.spec import paged_of, state_bytes
from workers.llm.models.registry import decoder_of

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
# The published models among the shapes, by their names on the hub.
PUBLISHED = {
    "Qwen2-VL-2B": "2b",
    "Qwen2-VL-7B": "7b",
    "Qwen2.5-VL-3B": "qwen2.5-vl-3b",
    "Qwen2.5-VL-7B": "qwen2.5-vl-7b",
    "Qwen2.5-VL-32B": "qwen2.5-vl-32b",
    "Qwen2.5-VL-72B": "qwen2.5-vl-72b",
    "Qwen3-VL-2B": "qwen3-vl-2b",
    "Qwen3-VL-4B": "qwen3-vl-4b",
    "Qwen3-VL-8B": "qwen3-vl-8b",
    "Qwen3-VL-32B": "qwen3-vl-32b",
    "Qwen3-VL-30B-A3B": "qwen3-vl-30b-a3b",
    "Qwen3-VL-235B-A22B": "qwen3-vl-235b-a22b",
    "Qwen3.5-0.8B": "qwen3.5-0.8b",
    "Qwen3.5-9B": "qwen3.5-9b",
    "Qwen3.5-27B": "qwen3.5-27b",
    "Qwen3.5-35B-A3B": "qwen3.5-35b-a3b",
}
# What quantisation leaves in 16 bits, beside vectors: the table of embeddings, routers, embeddings of patches
# and of positions, convolutions.
DENSE = (
    "embed_tokens.weight",
    "mlp.gate.weight",
    "patch_embed.proj.weight",
    "pos_embed.weight",
    "conv1d.weight",
)
INT4_BITS = 4.25
GIB, MIB = 1 << 30, 1 << 20
INTRODUCTION = f"""# Memory

Written by `tools/memory_page.py`: computed from the published models' shapes, not measured. Each figure is
for the whole model; weights are in GiB. With `--tp` each rank has its part, and each ViT a whole tower.

| column | is |
| --- | --- |
| weights | of decoder and tower, as published, in 16 bits |
| int8, int4 | of both, with `--quantization`; int4 has {INT4_BITS} bits a weight with AVX2, else 8 |
| tower | the part of the weights in 16 bits that is the vision tower's |
| KV | keys and values of 1000 tokens, in 16 bits: text and pictures alike |
| state | of one sequence, for layers with linear attention, whatever its length |
| embeddings | of 1000 tokens of pictures, in a ViT's pool (`--embedding-pool-mib`) |

"""
END = """
What comes on top:

- **The KV cache.** On a CPU it has 1 GiB, and room for 32 states (`--kv-cache-gib`). On a GPU it has what
  `--gpu-memory-utilization` (0.9) leaves. A picture of 1280 tokens takes the KV of 1280 tokens.
  `--kv-cache-dtype int8` takes 0.52 of it with heads of 128 or 256 numbers.
- **Pools.** A ViT has `--embedding-pool-mib` (256 MiB), preprocess `--pixel-pool-mib` (256 MiB).
- **Processes.** All together take about 1 GiB beside weights and caches. The launcher warns at the start
  where the weights leave the machine no room.
- **Loading.** Weights are packed layer by layer: the peak is a little above what stays
  ([quantization](quantization.md#what-it-costs) has what was measured).

`python -m tools.random_checkpoint qwen3-vl-2b FOLDER` writes a checkpoint of such a shape, with random
weights. A server with it (`--model FOLDER`) shows what that model takes on your machine, without a download.
"""


class _Need(NamedTuple):
    """Bytes."""

    weights: int
    int8: float
    int4: float
    tower: int
    kv: int  # of 1000 tokens
    state: int  # of one sequence
    embeddings: int  # of 1000 tokens


def page() -> str:
    rows = ["| model | weights | int8 | int4 | tower | KV | state | embeddings |"]
    rows.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    rows += [_row(name, need_of(shape)) for name, shape in PUBLISHED.items()]
    return INTRODUCTION + "\n".join(rows) + "\n" + END


def _row(name: str, need: _Need) -> str:
    weights = " | ".join(f"{size / GIB:.1f}" for size in (need.weights, need.int8, need.int4, need.tower))
    state = f"{need.state / MIB:.0f} MiB" if need.state else ""
    kv, embeddings = (f"{size / MIB:.0f} MiB" for size in (need.kv, need.embeddings))
    return f"| {name} | {weights} | {kv} | {state} | {embeddings} |"


def need_of(shape: str) -> _Need:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_settings(folder, SHAPES[shape])
        info, tensors = read_model_info(folder), hub_shapes(folder)
    spec = decoder_of(info).spec_of(info.text, 1)
    kv = sum(paged.bytes_per_token(torch.bfloat16) for paged in paged_of(spec))
    tower = sum(math.prod(size) for tensor, size in tensors.items() if "visual." in tensor)
    return _Need(
        weights=2 * sum(map(math.prod, tensors.values())),
        int8=_quantized(tensors, 8),
        int4=_quantized(tensors, INT4_BITS),
        tower=2 * tower,
        kv=1000 * kv,
        state=state_bytes(spec, torch.bfloat16),
        embeddings=1000 * 2 * info.vision.embedding_width,
    )


def _quantized(tensors: Mapping[str, tuple[int, ...]], bits: float) -> float:
    """Bytes of all weights, those of linear layers in so many bits. An output layer that is the table of
    embeddings is quantised beside it."""
    total = 0.0
    for name, size in tensors.items():
        is_dense = len(size) < 2 or name.endswith(DENSE)
        total += math.prod(size) * (16 if is_dense else bits) / 8
    if "lm_head.weight" not in tensors:
        table = next(size for name, size in tensors.items() if name.endswith("embed_tokens.weight"))
        total += math.prod(table) * bits / 8
    return total


if __name__ == "__main__":
    PAGE.write_text(page())
