"""Towers of all kinds with tiny random weights, ours beside transformers': two kinds of layers where a tower
has them, and heads and MLPs that are no multiple of 8."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5VisionConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from pipeline.families import VisionInfo
from pipeline.families.qwen2_5_vl import WindowedVisionInfo
from pipeline.families.qwen3_vl import Qwen3VisionInfo
from pipeline.wire.base import GridTHW
from workers.nn.weights.dense import Dense
from workers.nn.weights.registry import open_weights
from workers.vit.models import qwen2_5_vl, qwen2_vl, qwen3_vl
from workers.vit.models.base import EncodeJob, Encoder, Tower
from workers.vit.models.patches import patchify

CPU = torch.device("cpu")
WIDTH, PATCH, MERGE = 40, 4, 2
SIZES: dict[str, Any] = {
    "depth": 3, "embed_dim": 48, "num_heads": 4, "intermediate_size": 60, "patch_size": PATCH,
    "merge_size": MERGE, "temporal_patch_size": 2, "image_mean": (0.5, 0.4, 0.3),
    "image_std": (0.2, 0.3, 0.25), "min_pixels": 1, "max_pixels": 256 * 256,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "depth": 3, "hidden_size": 48, "num_heads": 4, "intermediate_size": 60, "patch_size": PATCH,
    "out_hidden_size": WIDTH, "spatial_merge_size": MERGE, "temporal_patch_size": 2,
}  # fmt: skip
# In tokens: each side from one to nine, squares and thin ones, and more frames than one.
GRIDS = [
    GridTHW(frames, MERGE * height, MERGE * width)
    for frames, height, width in (
        (1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 1, 9), (1, 9, 1), (1, 2, 2), (2, 1, 3), (1, 3, 3), (1, 4, 4),
        (1, 5, 4), (1, 4, 5), (1, 5, 5), (3, 5, 6), (1, 6, 6), (1, 7, 3), (1, 3, 7), (2, 7, 7), (1, 8, 8),
        (1, 8, 4), (1, 9, 9), (1, 9, 8), (2, 9, 5), (1, 2, 9), (1, 6, 9), (4, 3, 2), (1, 1, 30), (1, 30, 1),
        (1, 2, 25), (2, 3, 17), (1, 4, 4),
    )
]  # fmt: skip


class TinyTower(NamedTuple):
    tower: Tower
    info: VisionInfo
    reference: nn.Module  # of transformers, in float32
    folder: Path  # with its weights

    def encoder(
        self, dtype: torch.dtype = torch.float32, dense: Dense | None = None, quantization: str = "none"
    ) -> Encoder:
        weights = open_weights(self.folder, dtype, CPU, quantization, dense=dense)
        return self.tower.encoder(self.info, weights)

    def expected(self, jobs: Sequence[EncodeJob]) -> Tensor:
        """What transformers' tower makes of these: [num_tokens, width]."""
        patches = torch.cat([patchify(job.pixels, self.info) for job in jobs])
        grids = torch.tensor([list(job.grid_thw) for job in jobs])
        with torch.inference_mode():
            found = self.reference(patches, grid_thw=grids)
        return torch.cat([found.pooler_output, *(found.get("deepstack_features") or [])], dim=-1)


def full_tower(folder: Path) -> TinyTower:
    config = {**CONFIG, "embed_dim": 48, "hidden_size": WIDTH, "mlp_ratio": 2}
    reference = Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**config))
    info = VisionInfo(**{**SIZES, "intermediate_size": 96}, embedding_width=WIDTH)
    return _saved(qwen2_vl.TOWER, info, reference, folder)


def windowed_tower(folder: Path, window_size: int = 3) -> TinyTower:
    pixels = window_size * MERGE * PATCH
    reference = Qwen2_5_VisionTransformerPretrainedModel(
        Qwen2_5_VLVisionConfig(**CONFIG, window_size=pixels, fullatt_block_indexes=[1])
    )
    info = WindowedVisionInfo(
        **SIZES, embedding_width=WIDTH, window_size=window_size, full_attention_layers=(1,)
    )
    return _saved(qwen2_5_vl.TOWER, info, reference, folder)


def deepstack_tower(folder: Path, layers: tuple[int, ...] = (0, 2)) -> TinyTower:
    reference = Qwen3VLVisionModel(
        Qwen3VLVisionConfig(**CONFIG, num_position_embeddings=25, deepstack_visual_indexes=list(layers))
    )
    info = Qwen3VisionInfo(
        **SIZES, embedding_width=WIDTH * (1 + len(layers)), position_side=5, deepstack_layers=layers
    )
    return _saved(qwen3_vl.TOWER, info, reference, folder)


def plain_tower(folder: Path) -> TinyTower:
    """Of Qwen3.5, without deepstack."""
    config = Qwen3_5VisionConfig(**CONFIG, num_position_embeddings=25)
    info = Qwen3VisionInfo(**SIZES, embedding_width=WIDTH, position_side=5, deepstack_layers=())
    return _saved(qwen3_vl.TOWER, info, Qwen3_5VisionModel(config), folder)


TOWERS: dict[str, Callable[[Path], TinyTower]] = {
    "full": full_tower,
    "windowed": windowed_tower,
    "deepstack": deepstack_tower,
}


def make_jobs(
    info: VisionInfo, grids: Sequence[GridTHW] = GRIDS, dtype: torch.dtype = torch.float32
) -> list[EncodeJob]:  # fmt: skip
    """Of random pixels, the same in each call. What nobody writes stays NaN."""
    generator, jobs = torch.Generator().manual_seed(0), []
    for grid in grids:
        frames = grid.t * info.temporal_patch_size if grid.t > 1 else 1
        size = frames, grid.h * info.patch_size, grid.w * info.patch_size, 3
        pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        shape = info.num_tokens(grid), info.embedding_width
        jobs.append(EncodeJob(pixels, grid, torch.full(shape, torch.nan, dtype=dtype)))
    return jobs


def _saved(tower: Tower, info: VisionInfo, reference: nn.Module, folder: Path) -> TinyTower:
    """Weights so large that each layer and each position counts, and exact in each type."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                values *= 1.5 / parameter[0].numel() ** 0.5
            else:
                values = 0.2 * values + (
                    1.0 if ("norm" in name or "ln_q" in name) and "weight" in name else 0
                )
            parameter.copy_(values.bfloat16())
    folder.mkdir(exist_ok=True)
    tensors = {f"visual.{name}": value.contiguous() for name, value in reference.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return TinyTower(tower, info, reference.eval(), folder)
