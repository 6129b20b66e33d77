"""All formats by the names of the option `--quantized`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from tools.random_checkpoint.quantized.awq import AwqRecipe
from tools.random_checkpoint.quantized.base import Recipe
from tools.random_checkpoint.quantized.compressed import CompressedRecipe, Group
from tools.random_checkpoint.quantized.gptq import AutoRoundRecipe, GptqRecipe
from tools.random_checkpoint.quantized.scaled import BlockRecipe, ModelOptRecipe, TensorRecipe
from tools.random_checkpoint.quantized.unserved import GgufRecipe, Nvfp4Recipe

DYNAMIC_FP8 = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
DYNAMIC_INT8 = {"num_bits": 8, "strategy": "token", "dynamic": True}
CHANNEL_FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
CHANNEL_INT8 = {"num_bits": 8, "strategy": "channel"}
MLP, NOT_MLP = r"re:.*mlp.*", r"re:.*(self_attn|linear_attn).*"


def _int4(group_size: int, is_symmetric: bool = True) -> dict[str, object]:
    return {"num_bits": 4, "strategy": "group", "group_size": group_size, "symmetric": is_symmetric}


# From a size of groups, or of blocks, to the recipe.
RECIPES: Mapping[str, Callable[[int], Recipe]] = {
    "fp8-block": lambda size: BlockRecipe(size, torch.bfloat16, stacks_experts=False),
    "fp8-block-stacked": lambda size: BlockRecipe(size, torch.float32, stacks_experts=True),
    "fp8-tensor": lambda size: TensorRecipe(),
    "awq": AwqRecipe,
    "gptq": GptqRecipe,
    "gptq-v2": lambda size: GptqRecipe(size, version=2, is_symmetric=False),
    "gptq-desc-act": lambda size: GptqRecipe(size, is_symmetric=False, has_desc_act=True),
    "gptq-int8": lambda size: GptqRecipe(size, bits=8),
    "gptq-mlp": lambda size: GptqRecipe(size, only=r"\.mlp\."),
    "auto-round": AutoRoundRecipe,
    "compressed-int4": lambda size: CompressedRecipe(Group("pack-quantized", _int4(size))),
    "compressed-int4-asym": lambda size: CompressedRecipe(Group("pack-quantized", _int4(size, False))),
    "compressed-w8a16": lambda size: CompressedRecipe(Group("pack-quantized", CHANNEL_INT8)),
    "compressed-w8a8": lambda size: CompressedRecipe(Group("int-quantized", CHANNEL_INT8, DYNAMIC_INT8)),
    "compressed-fp8": lambda size: CompressedRecipe(Group("float-quantized", CHANNEL_FP8, DYNAMIC_FP8)),
    "compressed-fp8-tower": lambda size: CompressedRecipe(
        Group("float-quantized", CHANNEL_FP8, DYNAMIC_FP8), has_tower=True
    ),
    "compressed-fp8-block": lambda size: CompressedRecipe(
        Group(
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [size, size]},
            {"num_bits": 8, "type": "float", "strategy": "group", "group_size": size, "dynamic": True},
        )
    ),
    "compressed-mixed": lambda size: CompressedRecipe(
        Group("pack-quantized", _int4(size), targets=(MLP,)),
        Group("float-quantized", CHANNEL_FP8, DYNAMIC_FP8, targets=(NOT_MLP,)),
    ),
    "modelopt-fp8": lambda size: ModelOptRecipe(),
    "nvfp4": lambda size: Nvfp4Recipe(),
    "gguf": lambda size: GgufRecipe(),
}
