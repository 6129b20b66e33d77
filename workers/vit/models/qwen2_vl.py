"""Qwen2-VL's tower: full attention in each frame, LayerNorm, QuickGELU."""

from __future__ import annotations

from torch import Tensor

from pipeline.families import VisionInfo
from workers.nn.native import operators
from workers.nn.weights.weights import Weights
from workers.vit.models.base import Encoder, Inputs, Tower
from workers.vit.models.layers import PREFIX, Block, Merger, PlainMlp, embed_patches, layer_norm, patch_embed
from workers.vit.models.patches import PatchPreparation
from workers.vit.models.segments import attention
from workers.vit.pace import UNPACED, Pace


class VisionEncoder(Encoder):
    """Loads the tower under `visual.` of a checkpoint."""

    def __init__(self, info: VisionInfo, weights: Weights) -> None:
        self.preparation = PatchPreparation(info)
        self.dtype, self.device = weights.dtype, weights.device
        tower = weights.under(PREFIX.rstrip("."))
        self.patch_embed = patch_embed(tower)
        self.blocks = [_block(info, tower.under(f"blocks.{index}")) for index in range(info.depth)]
        mlp = tower.under("merger.mlp")
        self.merger = Merger(info, layer_norm(tower, "merger.ln_q"), mlp.linear("0"), mlp.linear("2"))

    def forward(self, inputs: Inputs, pace: Pace = UNPACED) -> Tensor:
        tensors = inputs.tensors
        x = embed_patches(self.patch_embed, tensors["patches"], self.dtype, pace)
        attend = attention(inputs.lengths.get("frames"), x, pace)
        for block in self.blocks:
            x = block(x, tensors["cos"], tensors["sin"], attend, pace)
            pace.after_layer()
        return self.merger(x, pace)


TOWER = Tower(PatchPreparation, VisionEncoder, PREFIX)


def _block(info: VisionInfo, weights: Weights) -> Block:
    mlp = weights.under("mlp")
    return Block(info, weights, layer_norm, PlainMlp(mlp.linear("fc1"), mlp.linear("fc2"), _quick_gelu))


def _quick_gelu(x: Tensor) -> Tensor:
    if operators.takes(x):
        return operators.quick_gelu_(x)
    gate = (1.702 * x).sigmoid_()
    return x.mul_(gate)
