"""Which layers of a checkpoint makers quantise: the projections of the decoder's attention and MLPs."""

from __future__ import annotations

import re

PROJECTIONS = re.compile(
    r"model\.(language_model\.)?layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|mlp\.(shared_expert\.|experts\.\d+\.)?(gate|up|down)_proj"
    r"|linear_attn\.(in_proj_qkv|in_proj_z|out_proj))$"
)
STACKED = re.compile(r".*\.mlp\.experts\.(gate_up|down)_proj$")
TOWER = re.compile(r".*visual\..*\.(qkv|proj|fc[12]|linear_fc[12]|mlp\.[02]|(gate|up|down)_proj)$")
# Further layers, which stay dense; routers are among them.
OTHERS = re.compile(
    r"(lm_head|mtp\.fc"
    r"|.*\.mlp\.gate|.*\.shared_expert_gate|.*\.in_proj_[ab]|mtp\.layers\.\d+\..*_proj)$"
)
