"""Qwen2-VL's vision encoder. All that depends on the grids comes in as an input.

Pictures (frames of a video too) attend within themselves only. They come packed, in any sizes, and `lengths` says where one ends
and the next begins; or as a batch of equal grids, which needs no mask, and which exports.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.families import VisionInfo
from pipeline.messages import GridTHW
from workers.nn.layers import LayerNorm, Linear, make_linear, rotate
from workers.nn.loader import Checkpoint
from workers.vit.blocks import Blocks

MakeLinear = Callable[..., Linear]  # (weight, bias=None)
LAYER_NORM_EPS = 1e-6
ROPE_THETA = 10_000.0


class VisionEncoder:
    """Loads the tower under `visual.` of a checkpoint."""

    def __init__(self, info: VisionInfo, checkpoint: Checkpoint, linear: MakeLinear = make_linear) -> None:
        self.info = info
        self.dtype, self.device = checkpoint.dtype, checkpoint.device

        def load(name: str) -> Linear:
            return linear(checkpoint.load(f"{name}.weight"), checkpoint.load(f"{name}.bias"))

        self.patch_embed = linear(checkpoint.load("visual.patch_embed.proj.weight").flatten(1))
        self.blocks = [_Block(info, checkpoint, load, f"visual.blocks.{index}.") for index in range(info.depth)]
        self.norm = _layer_norm(checkpoint, "visual.merger.ln_q")
        self.merger_in = load("visual.merger.mlp.0")
        self.merger_out = load("visual.merger.mlp.2")

    def __call__(
        self, patches: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int] | None = None,
        after_layer: Callable[[int], None] | None = None, blocks: Blocks | None = None,
    ) -> Tensor:  # fmt: skip
        """Embeddings [num_patches / merge², hidden] of patches [num_patches, channels · temporal · patch²].

        cos and sin are those of `rotary_tables`, [num_patches, 1, head_dim] float32; lengths are the patches of each frame, in order.
        Without lengths patches are [frames, num_patches, …], embeddings too, and each frame's patches stand where cos and sin say.
        Packed patches may be computed in `blocks`.
        """
        x = self.patch_embed(patches.to(self.dtype))  # [num_patches, embed_dim]
        frames = None if lengths is None else Frames(lengths, x, blocks)
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, frames)
            if after_layer is not None:
                after_layer(index)
        x = self.norm(x).unflatten(-2, (-1, self.info.merge_size**2)).flatten(-2)  # four neighbouring patches side by side
        (embeddings,) = _by_rows(frames, self._merge, flop_of(self.merger_in, self.merger_out), x)
        return embeddings

    def _merge(self, x: Tensor) -> tuple[Tensor]:
        return (self.merger_out(F.gelu(self.merger_in(x))),)


def flop_of(*layers: Linear) -> float:
    """Floating point operations of these layers for one row."""
    return sum(2.0 * layer.in_features * layer.out_features for layer in layers)


def _by_rows(frames: Frames | None, function: Callable[..., tuple[Tensor, ...]], flop_per_row: float, *inputs: Tensor) -> tuple[Tensor, ...]:
    if frames is None or frames.blocks is None:
        return function(*inputs)
    return frames.blocks.rows(function, flop_per_row, *inputs)


class Frames:
    """Where each frame ends among packed patches, and attention within each of them."""

    def __init__(self, lengths: Sequence[int], x: Tensor, blocks: Blocks | None = None) -> None:
        self.lengths, self.longest, self.blocks = list(lengths), max(lengths), blocks
        self._ends: Tensor | None = None
        if x.device.type == "cuda" and x.dtype != torch.float32:  # for float32 there is no kernel
            self._ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(x.device, non_blocking=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[num_patches, heads, head_dim], all of them."""
        if self._ends is not None:
            from torch.nn.attention.varlen import varlen_attn

            return varlen_attn(q, k, v.contiguous(), self._ends, self._ends, self.longest, self.longest)  # type: ignore[return-value]
        frames = zip(*(x.transpose(0, 1).split(self.lengths, dim=1) for x in (q, k, v)), strict=True)
        parts = [self._attend_one(q, k, v) for q, k, v in frames]
        return torch.cat(parts, dim=1).transpose(0, 1)

    def _attend_one(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.blocks is not None:
            return self.blocks.attend(q, k, v)
        return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]


class _Block:
    def __init__(self, info: VisionInfo, checkpoint: Checkpoint, load: Callable[[str], Linear], prefix: str) -> None:
        self.num_heads = info.num_heads
        self.norm1 = _layer_norm(checkpoint, f"{prefix}norm1")
        self.norm2 = _layer_norm(checkpoint, f"{prefix}norm2")
        self.qkv = load(f"{prefix}attn.qkv")
        self.proj = load(f"{prefix}attn.proj")
        self.fc1 = load(f"{prefix}mlp.fc1")
        self.fc2 = load(f"{prefix}mlp.fc2")

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, frames: Frames | None) -> Tensor:
        q, k, v = _by_rows(frames, self._qkv, flop_of(self.qkv), x, cos, sin)
        if frames is not None:
            attended = frames.attend(q, k, v).flatten(-2)
        else:
            heads = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            attended = heads.transpose(1, 2).flatten(-2)
        (out,) = _by_rows(frames, self._after_attention, flop_of(self.proj, self.fc1, self.fc2), x, attended)
        return out

    def _qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated, and values: each […, num_patches, heads, head_dim]."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return rotate(q.float(), cos, sin).to(v.dtype), rotate(k.float(), cos, sin).to(v.dtype), v

    def _after_attention(self, x: Tensor, attended: Tensor) -> tuple[Tensor]:
        x = self.proj.add_to(x, attended)
        hidden = self.fc1(self.norm2(x))
        gate = (1.702 * hidden).sigmoid_()  # QuickGELU
        return (self.fc2.add_to(x, hidden.mul_(gate)),)


def _layer_norm(checkpoint: Checkpoint, name: str) -> LayerNorm:
    return LayerNorm(checkpoint.load(f"{name}.weight"), checkpoint.load(f"{name}.bias"), LAYER_NORM_EPS)


def patchify(pixels: Tensor, info: VisionInfo) -> Tensor:
    """Normalised patches [num_patches, channels · temporal · patch²] float32 of uint8 pixels [frames, height, width, 3].

    Patches of one merged token stand together. A single picture is repeated to fill the temporal patch.
    """
    mean = torch.tensor(info.image_mean, device=pixels.device)
    std = torch.tensor(info.image_std, device=pixels.device)
    x = (pixels.float() / 255 - mean) / std
    if missing := -len(x) % info.temporal_patch_size:
        x = torch.cat([x, x[-1:].expand(missing, -1, -1, -1)])
    frames, height, width, channels = x.shape
    patch, merge, temporal = info.patch_size, info.merge_size, info.temporal_patch_size
    x = x.view(frames // temporal, temporal, height // patch // merge, merge, patch, width // patch // merge, merge, patch, channels)
    x = x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)  # time, rows, columns, merge rows, merge columns, channel, temporal, patch, patch
    return x.reshape(-1, channels * temporal * patch * patch)


def rotary_angles(grid: GridTHW, info: VisionInfo) -> Tensor:
    """Angles [num_patches, head_dim / 2] float32 of the patches' rows and columns, in the order of `patchify`."""
    merge = info.merge_size
    rows = torch.arange(grid.h)[:, None].expand(grid.h, grid.w)
    columns = torch.arange(grid.w)[None, :].expand(grid.h, grid.w)
    grouped = [x.reshape(grid.h // merge, merge, grid.w // merge, merge).transpose(1, 2).flatten().repeat(grid.t) for x in (rows, columns)]
    quarter = info.embed_dim // info.num_heads // 2
    frequencies = 1.0 / (ROPE_THETA ** (torch.arange(0, quarter, 2, dtype=torch.float32) / quarter))
    return torch.cat([x[:, None].float() * frequencies for x in grouped], dim=-1)
