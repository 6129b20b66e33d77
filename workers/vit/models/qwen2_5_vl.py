"""Qwen2.5-VL's tower: most layers attend within square windows of a frame; RMSNorm, SwiGLU.

Windows at the right and lower edges are smaller. Packed rows come in the order of windows, those of one size
side by side; the embeddings are put back into the order of tokens:

    tokens   [num_tokens] int64: the row of each token

A batch keeps the order of patches. Layers with windows gather the patches of each window, and put the result
back:

    windows  [num_windows, window_patches] int64: patches, -1 where a window has fewer
    places   [num_patches] int64: where each patch lies in the flattened windows
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.families import MAX_ASPECT_RATIO, VisionInfo
from pipeline.families.qwen2_5_vl import WindowedVisionInfo
from pipeline.wire.base import GridTHW
from workers.nn.weights.weights import Weights
from workers.vit.models.base import Axis, EncodeJob, Encoder, Inputs, InputSpec, Range, Tower
from workers.vit.models.layers import PREFIX, Block, GatedMlp, Merger, embed_patches, patch_embed, rms_norm
from workers.vit.models.patches import PatchPreparation, frames_of
from workers.vit.models.segments import Attend, attention
from workers.vit.pace import UNPACED, Pace

WINDOWS = Axis("windows", most=1 << 18)
MASKED = -1e4  # added to a score: its weight is 0, and float16 can hold it


class WindowOrder(NamedTuple):
    """The tokens of a frame in the order of its windows, larger windows first."""

    tokens: Tensor  # [num_tokens] int64
    sizes: tuple[int, ...]  # the number of tokens of each window


@functools.lru_cache(16)
def window_order(height: int, width: int, side: int) -> WindowOrder:
    """Of a frame of height · width tokens, in windows of at most side · side tokens."""
    rows, columns = torch.arange(height) // side, torch.arange(width) // side
    windows = (rows[:, None] * -(-width // side) + columns).flatten()
    sizes = windows.bincount()
    by_window = windows.argsort(stable=True)
    tokens = by_window[sizes[windows[by_window]].argsort(stable=True, descending=True)]
    return WindowOrder(tokens, tuple(sizes.sort(descending=True).values.tolist()))


class WindowedPreparation(PatchPreparation):
    info: WindowedVisionInfo

    def __init__(self, info: VisionInfo) -> None:
        assert isinstance(info, WindowedVisionInfo)
        super().__init__(info)
        self._merged = info.merge_size**2
        self._window_patches = info.window_size**2 * self._merged

    @property
    def specs(self) -> tuple[InputSpec, ...]:
        return (
            *super().specs,
            InputSpec("windows", torch.int64, (WINDOWS, self._window_patches)),
            InputSpec("places", torch.int64, (self.patches,)),
        )

    def packed(self, jobs: Sequence[EncodeJob], device: torch.device) -> Inputs:
        inputs = super().packed(jobs, device)
        orders = [self._order(grid) for grid in frames_of(jobs)]
        starts = [0]
        for order in orders:
            starts.append(starts[-1] + len(order.tokens))
        tokens = torch.cat([order.tokens + start for order, start in zip(orders, starts, strict=False)])
        on_device = tokens.to(device)
        in_order = {
            name: rows.unflatten(0, (-1, self._merged))[on_device].flatten(0, 1)
            for name, rows in inputs.tensors.items()
        }
        lengths = [size * self._merged for order in orders for size in order.sizes]
        return Inputs(
            {**in_order, "tokens": tokens.argsort().to(device)}, {**inputs.lengths, "windows": lengths}
        )

    def batch(self, jobs: Sequence[EncodeJob], device: torch.device) -> Inputs:
        order = self._order(jobs[0].grid_thw)
        sizes = torch.tensor(order.sizes) * self._merged
        patches = order.tokens[:, None] * self._merged + torch.arange(self._merged)
        is_patch = torch.arange(self._window_patches) < sizes[:, None]
        windows = torch.full(is_patch.shape, -1)
        windows[is_patch] = patches.flatten()
        places = torch.empty(patches.numel(), dtype=torch.int64)
        places[patches.flatten()] = is_patch.flatten().nonzero()[:, 0]
        ours = {"windows": windows.to(device), "places": places.to(device)}
        return Inputs({**super().batch(jobs, device).tensors, **ours}, {})

    @property
    def sample_grid(self) -> GridTHW:
        """Three windows."""
        merge = self.info.merge_size
        return GridTHW(2, merge, (2 * self.info.window_size + 1) * merge)

    def sizes(self, frames: Range, patches: Range) -> dict[str, Range]:
        window, usual = self.info.window_size, patches.usual // self._merged
        windows = Range(
            least=-(-patches.least // self._window_patches),
            usual=(-(-math.isqrt(usual) // window)) ** 2,  # of a square
            most=most_windows(patches.most // self._merged, window),
        )
        return {**super().sizes(frames, patches), WINDOWS.name: windows}

    def flop(self, num_patches: int) -> float:
        within = min(num_patches, self._window_patches)
        attended = [
            num_patches if layer in self.info.full_attention_layers else within
            for layer in range(self.info.depth)
        ]
        return sum(self.layer_flop(num_patches, count, mlp_matrices=3) for count in attended)

    def _order(self, grid: GridTHW) -> WindowOrder:
        merge = self.info.merge_size
        return window_order(grid.h // merge, grid.w // merge, self.info.window_size)


def most_windows(num_tokens: int, side: int) -> int:
    """No frame of at most so many tokens has more windows: the thinnest that a processor takes has the most.

    It rounds the sides of a picture down to whole tokens: the thinner side by less than one.
    """
    most = 0
    for height in range(1, math.isqrt(num_tokens) + 1):
        width = min(num_tokens // height, MAX_ASPECT_RATIO * (height + 1))
        most = max(most, -(-height // side) * -(-width // side))
    return most


class WindowedEncoder(Encoder):
    """Loads the tower under `visual.` of a checkpoint."""

    def __init__(self, info: VisionInfo, weights: Weights) -> None:
        assert isinstance(info, WindowedVisionInfo)
        self.preparation = WindowedPreparation(info)
        self.dtype, self.device = weights.dtype, weights.device
        tower = weights.under(PREFIX.rstrip("."))
        self.patch_embed = patch_embed(tower)
        self.blocks = [_block(info, tower.under(f"blocks.{index}")) for index in range(info.depth)]
        mlp = tower.under("merger.mlp")
        self.merger = Merger(info, rms_norm(tower, "merger.ln_q"), mlp.linear("0"), mlp.linear("2"))
        self._full = frozenset(info.full_attention_layers)

    def forward(self, inputs: Inputs, pace: Pace = UNPACED) -> Tensor:
        tensors = inputs.tensors
        x = embed_patches(self.patch_embed, tensors["patches"], self.dtype, pace)
        in_frames = attention(inputs.lengths.get("frames"), x, pace)
        if inputs.lengths:
            in_windows = attention(inputs.lengths["windows"], x, pace)
        else:
            in_windows = attention_in_windows(tensors["windows"], tensors["places"])
        for layer, block in enumerate(self.blocks):
            attend = in_frames if layer in self._full else in_windows
            x = block(x, tensors["cos"], tensors["sin"], attend, pace)
            pace.after_layer()
        merged = self.merger(x, pace)
        return merged[tensors["tokens"]] if inputs.lengths else merged


TOWER = Tower(WindowedPreparation, WindowedEncoder, PREFIX)


def _block(info: WindowedVisionInfo, weights: Weights) -> Block:
    return Block(info, weights, rms_norm, GatedMlp(weights.under("mlp")))


def attention_in_windows(windows: Tensor, places: Tensor) -> Attend:
    """For batches: [frames, num_patches, heads, head_dim] of frames that share their windows."""
    # Not a mask of booleans: TensorRT cannot compile one for every size of heads.
    padding = torch.where(windows >= 0, 0.0, MASKED)
    patches = windows.clamp(min=0).flatten()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_frames, (num_windows, window_patches) = q.shape[0], windows.shape
        shape = num_frames * num_windows, window_patches
        q, k, v = (
            x.index_select(1, patches).flatten(0, 1).unflatten(0, shape).transpose(1, 2) for x in (q, k, v)
        )
        # onnxruntime wants a row of the mask for each query.
        mask = padding.to(q.dtype)[:, None, None].expand(num_frames, -1, 1, window_patches, -1).flatten(0, 1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        rows: Tensor = attended.transpose(1, 2).flatten(0, 1).unflatten(0, (num_frames, -1))
        return rows.index_select(1, places)

    return attend
