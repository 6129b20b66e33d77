"""Qwen2-VL's decoder on a flat batch of tokens: no batch dimension, sequences side by side. Sharded over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.families import TextInfo
from workers.llm.parallel import HeadLayout, TensorParallel
from workers.nn.layers import Linear, RMSNorm, make_linear, rotary_tables, rotate
from workers.nn.loader import Checkpoint, Rows

MakeLinear = Callable[..., Linear]  # (weight, bias=None)


class Attention(Protocol):
    """An attention backend; `layout` is what its `plan` returned for the step."""

    def __call__(self, layer: int, layout: Any, q: Tensor, kv: Tensor) -> Tensor: ...


class Decoder:
    def __init__(self, info: TextInfo, checkpoint: Checkpoint, parallel: TensorParallel, linear: MakeLinear = make_linear) -> None:
        self.info, self.parallel, self._dtype = info, parallel, checkpoint.dtype
        self.heads = HeadLayout(info, parallel.rank, parallel.size)
        self._embeddings = _embedding_table(checkpoint)
        self.layers = [_Layer(info, checkpoint, self.heads, parallel, linear, index) for index in range(info.num_layers)]
        self.norm = RMSNorm(checkpoint.load("model.norm.weight"), info.rms_norm_eps)
        tied = info.tie_word_embeddings or "lm_head.weight" not in checkpoint
        rows = self.heads.vocab_rows
        head = checkpoint.load("model.embed_tokens.weight" if tied else "lm_head.weight", rows)
        if missing := self.heads.vocab_per_rank - len(head):
            head = torch.cat([head, head.new_zeros(missing, head.shape[1])])
        self.lm_head = linear(head)
        self._axes, self._frequencies = _rotary_constants(info, checkpoint.device)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[num_tokens, hidden]"""
        return self._embeddings[token_ids].to(self._dtype)

    @torch.inference_mode()
    def __call__(self, x: Tensor, positions: Tensor, attention: Attention, layout: Any) -> Tensor:
        """Hidden states [num_tokens, hidden] of embedded tokens x at M-RoPE positions [3, num_tokens]."""
        cos, sin = rotary_tables(positions[self._axes].float().T * self._frequencies, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, attention, layout)
        return self.norm(x)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[num_rows, vocab] float32, on every rank."""
        return self.parallel.gather_last(self.lm_head(hidden).float())[:, : self.info.vocab_size]


class _Layer:
    def __init__(self, info: TextInfo, checkpoint: Checkpoint, heads: HeadLayout, parallel: TensorParallel, linear: MakeLinear, index: int) -> None:
        prefix = f"model.layers.{index}."
        self.heads, self.parallel, self.index = heads, parallel, index
        attn, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        parts = [("q_proj", heads.query_rows), ("k_proj", heads.kv_rows), ("v_proj", heads.kv_rows)]
        self.qkv = linear(
            torch.cat([checkpoint.load(f"{attn}{name}.weight", rows) for name, rows in parts]),
            torch.cat([checkpoint.load(f"{attn}{name}.bias", rows) for name, rows in parts]),
        )
        self.o_proj = linear(checkpoint.load(f"{attn}o_proj.weight", columns=heads.query_rows))
        self.gate_up = linear(torch.cat([checkpoint.load(f"{mlp}{name}.weight", heads.mlp_rows) for name in ("gate_proj", "up_proj")]))
        self.down = linear(checkpoint.load(f"{mlp}down_proj.weight", columns=heads.mlp_rows))
        self.input_norm = RMSNorm(checkpoint.load(f"{prefix}input_layernorm.weight"), info.rms_norm_eps)
        self.post_norm = RMSNorm(checkpoint.load(f"{prefix}post_attention_layernorm.weight"), info.rms_norm_eps)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, layout: Any) -> Tensor:
        heads, dim = self.heads, self.heads.head_dim
        qkv = self.qkv(self.input_norm(x)).view(len(x), -1, dim)
        turned = qkv[:, : heads.num_heads + heads.num_kv_heads]  # queries and keys at once
        turned.copy_(rotate(turned, cos, sin))
        out = attention(self.index, layout, qkv[:, : heads.num_heads], qkv[:, heads.num_heads :])
        x = self._add(x, self.o_proj, out.flatten(1))
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, dim=-1)
        return self._add(x, self.down, F.silu(gate).mul_(up))

    def _add(self, x: Tensor, linear: Linear, part: Tensor) -> Tensor:
        """x + linear(part), where each rank has a part."""
        if self.parallel.size == 1:
            return linear.add_to(x, part)
        return x + self.parallel.all_reduce(linear(part))


def _embedding_table(checkpoint: Checkpoint) -> Rows | Tensor:
    """[vocab, hidden]. On the CPU it stays in the file: where the output layer has the same weights they are in memory already."""
    name = "model.embed_tokens.weight"
    return checkpoint.rows(name) if checkpoint.device.type == "cpu" else checkpoint.load(name)


def _rotary_constants(info: TextInfo, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which position row each frequency turns with [head_dim / 2], and the frequencies [head_dim / 2] float32."""
    axes = torch.tensor([axis for axis, length in enumerate(info.mrope_section) for _ in range(length)], device=device)
    frequencies = 1.0 / (info.rope_theta ** (torch.arange(0, info.head_dim, 2, dtype=torch.float32, device=device) / info.head_dim))
    if len(axes) != len(frequencies):
        raise ValueError(f"mrope_section {info.mrope_section} adds up to {len(axes)}, the head has {len(frequencies)} frequencies")
    return axes, frequencies
