"""The vision tower while it learns: pictures of one size go through it as one batched call, and a linear head
reads its tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    VisionAttention,
    apply_rotary_pos_emb_vision,
)

from tools.tiny_model.labels import COUNTED, HEADS, IGNORED, NUM_CLASSES, TOKEN

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PATCH = TOKEN // 2
MASS_WEIGHT, SUM_WEIGHT = 20.0, 0.3


def to_patches(pixels: Tensor) -> Tensor:
    """[N, 2, height, width, 3] uint8 to [N, num_patches, 1176] float32, in the order of Qwen's image
    processor."""
    num_frames, _, height, width, _ = pixels.shape
    x = pixels.reshape(num_frames, 2, height // TOKEN, 2, PATCH, width // TOKEN, 2, PATCH, 3)
    x = (
        x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
        .reshape(num_frames, (height // PATCH) * (width // PATCH), 3, -1)
        .float()
    )
    mean, std = (x.new_tensor(values)[:, None] * 255 for values in (MEAN, STD))
    return x.sub_(mean).div_(std).flatten(2)


def grids(pixels: Tensor) -> Tensor:
    """[N, 3] int64: each pair of frames as a picture of its own, which is how the tower sees a video, too."""
    return torch.tensor(
        [[1, pixels.shape[2] // PATCH, pixels.shape[3] // PATCH]] * len(pixels), device=pixels.device
    )


def embed(tower: nn.Module, pixels: Tensor) -> Tensor:
    """[N, num_tokens, hidden] of pictures [N, 2, height, width, 3] uint8, from a tower that has been made
    fast."""
    embeddings: Tensor = tower(to_patches(pixels), grid_thw=grids(pixels)).pooler_output
    return embeddings


def attend_plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as two matmuls: with its gradient, on a processor and over short rows, five times as fast as
    the fused kernel."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return torch.softmax(scores, -1, dtype=scores.dtype) @ v


def make_fast(tower: Qwen2VisionTransformerPretrainedModel) -> None:
    """Training-only shortcuts with equal results: patch embedding as a matmul, and a batch of equal pictures
    as [N, num_patches, dim] all the way (kernels compiled for a flat row of patches of any number would
    divide for every element).
    """

    def embed_patches(patches: Tensor) -> Tensor:
        projection = tower.patch_embed.proj.weight
        return F.linear(patches.to(projection.dtype), projection.flatten(1))

    def attend(attention: VisionAttention) -> Callable[..., Tensor]:
        def forward(
            hidden: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: object
        ) -> Tensor:
            count, length, _dim = hidden.shape
            q, k, v = attention.qkv(hidden).reshape(count, length, 3, attention.num_heads, -1).unbind(2)
            # the same in every picture
            q, k = apply_rotary_pos_emb_vision(q, k, *(x[:length] for x in position_embeddings))
            q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
            return attention.proj(attend_plainly(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

        return forward

    tower.patch_embed.forward = embed_patches  # type: ignore[method-assign, assignment]
    for module in tower.modules():
        if isinstance(module, VisionAttention):
            module.forward = attend(module)  # type: ignore[method-assign]


class DenseHead(nn.Module):
    """The classes of each merged token and its shares of what is counted (labels.py); thrown away after
    training."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, NUM_CLASSES + len(COUNTED))

    def forward(self, embeddings: Tensor, classes: Tensor, mass: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Loss, and of each head the accuracy over tokens where something is; of the mass, how often a
        picture's sum is right when rounded: of all its things ("count"), and of those of a colour or a shape
        that is there ("count of").
        """
        logits = self.linear(embeddings).float()
        counted = ~mass.isnan()
        error = (logits[:, NUM_CLASSES:].reshape(mass.shape) - mass).masked_fill(~counted, 0.0)
        numbers = mass.sum((1, 2))  # [pictures, counted]; NaN where a token is not counted
        sum_error = error.sum((1, 2)).masked_fill(numbers.isnan(), 0.0)
        loss = MASS_WEIGHT * error.square().sum(-1).mean() + SUM_WEIGHT * F.smooth_l1_loss(
            sum_error, torch.zeros_like(sum_error)
        ) * len(COUNTED)
        is_right = (sum_error.abs() < 0.5).float()
        seen = {
            "count": is_right[:, 0][~numbers[:, 0].isnan()].mean().item(),
            "count of": is_right[:, 1:][numbers[:, 1:] > 0.5].mean().item(),
        }
        for index, head in enumerate(HEADS):
            targets = classes[..., index].flatten()
            scores = logits[:, head.start : head.start + head.size]
            weight = torch.ones(head.size, device=scores.device)
            weight[0] = 0.4  # most tokens are empty
            if (targets != IGNORED).any():
                loss = loss + F.cross_entropy(scores, targets, weight, ignore_index=IGNORED)
            there = targets > 0
            seen[head.name] = (
                (scores[there].argmax(-1) == targets[there]).float().mean().item()
                if there.any()
                else float("nan")
            )
        return loss, seen
