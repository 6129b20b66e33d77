"""Qwen2-VL's decoder on a flat batch of tokens: no batch dimension, sequences side by side. Sharded over
ranks.

There are two ways through a layer: torch's operators, and kernels that fuse what stands between the matrix
products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.families import TextInfo
from workers.llm.cache.spec import CacheSpec, Paged
from workers.llm.cache.state_tensors import StepStates
from workers.llm.parallel import HeadLayout, TensorParallel
from workers.nn.layers import Linear, RMSNorm, make_linear
from workers.nn.loader import Checkpoint, Rows

MakeLinear = Callable[..., Linear]  # (weight, bias=None)


class Attention(Protocol):
    """An attention backend; `layout` is what its `plan` returned for the step, `rotary` what its `rotary`
    did."""

    @staticmethod
    def rotary(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]: ...

    def __call__(
        self, layer: int, layout: Any, qkv: Tensor, bias: Tensor | None, rotary: tuple[Tensor, Tensor]
    ) -> Tensor: ...


class Kernels(NamedTuple):
    """Those of `workers.nn.kernels`."""

    add_rms_norm: Callable[[Tensor, Tensor | None, Tensor, float], Tensor]
    silu_mul: Callable[[Tensor], Tensor]


class Decoder:
    def __init__(
        self,
        info: TextInfo,
        checkpoint: Checkpoint,
        parallel: TensorParallel,
        linear: MakeLinear = make_linear,
        kernels: Kernels | None = None,
    ) -> None:
        self.info, self.parallel, self._dtype, self._kernels = info, parallel, checkpoint.dtype, kernels
        self.heads = HeadLayout(info, parallel.rank, parallel.size)
        self._embeddings = _embedding_table(checkpoint)
        self.layers = [
            _Layer(info, checkpoint, self.heads, parallel, linear, index, kernels is not None)
            for index in range(info.num_layers)
        ]
        self.norm = RMSNorm(checkpoint.load("model.norm.weight"), info.rms_norm_eps)
        tied = info.tie_word_embeddings or "lm_head.weight" not in checkpoint
        rows = self.heads.vocab_rows
        if tied and isinstance(self._embeddings, Tensor):
            head = self._embeddings[rows]  # the same memory
        else:
            head = checkpoint.load("model.embed_tokens.weight" if tied else "lm_head.weight", rows)
        if missing := self.heads.vocab_per_rank - len(head):
            head = torch.cat([head, head.new_zeros(missing, head.shape[1])])
        self.lm_head = linear(head)
        self.on_layer: Callable[[], object] = lambda: None  # where each layer is computed by itself
        self._axes, self._frequencies = _rotary_constants(info, checkpoint.device)

    @staticmethod
    def spec_of(info: TextInfo, tp_size: int) -> CacheSpec:
        """What one rank of a decoder of this shape keeps, known before it is loaded."""
        heads = HeadLayout(info, 0, tp_size)
        return [Paged(heads.num_kv_heads, heads.head_dim)] * info.num_layers

    def cache_spec(self) -> CacheSpec:
        return self.spec_of(self.info, self.parallel.size)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[num_tokens, hidden]"""
        return self._embeddings[token_ids].to(self._dtype)

    @torch.inference_mode()
    def __call__(
        self,
        x: Tensor,
        positions: Tensor,
        attention: Attention,
        layout: Any,
        states: StepStates | None = None,
    ) -> Tensor:
        """Hidden states [num_tokens, hidden] of embedded tokens x at M-RoPE positions [3, num_tokens].

        Kernels write over x. No layer of this decoder keeps a state.
        """
        rotary = attention.rotary(positions[self._axes].float().T * self._frequencies, x.dtype)
        if self._kernels is None:
            for layer in self.layers:
                x = layer(x, attention, layout, rotary)
                self.on_layer()
            return self.norm(x)
        delta: Tensor | None = None
        for layer in self.layers:
            delta = layer.with_kernels(self._kernels, x, delta, attention, layout, rotary)
        return self._kernels.add_rms_norm(x, delta, self.norm.weight, self.norm.eps)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[num_rows, vocab] float32, on every rank; in `out` where there is one."""
        logits = self.parallel.gather_last(self.lm_head(hidden))[:, : self.info.vocab_size]
        return logits.float() if out is None else out.copy_(logits)


class _Layer:
    def __init__(
        self,
        info: TextInfo,
        checkpoint: Checkpoint,
        heads: HeadLayout,
        parallel: TensorParallel,
        linear: MakeLinear,
        index: int,
        has_kernels: bool,
    ) -> None:
        prefix = f"model.layers.{index}."
        self.heads, self.parallel, self.index = heads, parallel, index
        attn, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        parts = [("q_proj", heads.query_rows), ("k_proj", heads.kv_rows), ("v_proj", heads.kv_rows)]
        weight, bias = (
            torch.cat([checkpoint.load(f"{attn}{name}.{kind}", rows) for name, rows in parts])
            for kind in ("weight", "bias")
        )
        self.qkv = linear(weight, None if has_kernels else bias)
        self.qkv_bias = bias if has_kernels else None  # which a kernel adds
        self.o_proj = linear(checkpoint.load(f"{attn}o_proj.weight", columns=heads.query_rows))
        self.gate_up = linear(
            torch.cat(
                [checkpoint.load(f"{mlp}{name}.weight", heads.mlp_rows) for name in ("gate_proj", "up_proj")]
            )
        )
        self.down = linear(checkpoint.load(f"{mlp}down_proj.weight", columns=heads.mlp_rows))
        self.input_norm = RMSNorm(checkpoint.load(f"{prefix}input_layernorm.weight"), info.rms_norm_eps)
        self.post_norm = RMSNorm(
            checkpoint.load(f"{prefix}post_attention_layernorm.weight"), info.rms_norm_eps
        )

    def __call__(self, x: Tensor, attention: Attention, layout: Any, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = self._add(x, self.o_proj, self._attend(self.input_norm(x), attention, layout, rotary))
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, dim=-1)
        return self._add(x, self.down, F.silu(gate).mul_(up))

    def with_kernels(
        self, kernels: Kernels, x: Tensor, delta: Tensor | None, attention: Attention, layout: Any,
        rotary: tuple[Tensor, Tensor]
    ) -> Tensor:  # fmt: skip
        """x becomes x + delta + what attention yields; returns what the MLP yields, which the next norm
        adds."""
        attended = self._attend(
            kernels.add_rms_norm(x, delta, self.input_norm.weight, self.input_norm.eps),
            attention,
            layout,
            rotary,
        )
        delta = self.parallel.all_reduce(self.o_proj(attended))
        hidden = kernels.add_rms_norm(x, delta, self.post_norm.weight, self.post_norm.eps)
        return self.parallel.all_reduce(self.down(kernels.silu_mul(self.gate_up(hidden))))

    def _attend(self, x: Tensor, attention: Attention, layout: Any, rotary: tuple[Tensor, Tensor]) -> Tensor:
        qkv = self.qkv(x).view(len(x), -1, self.heads.head_dim)
        return attention(self.index, layout, qkv, self.qkv_bias, rotary).flatten(1)

    def _add(self, x: Tensor, linear: Linear, part: Tensor) -> Tensor:
        """x + linear(part), where each rank has a part."""
        if self.parallel.size == 1:
            return linear.add_to(x, part)
        return x + self.parallel.all_reduce(linear(part))


def _embedding_table(checkpoint: Checkpoint) -> Rows | Tensor:
    """[vocab, hidden].

    On the CPU it stays in the file: where the output layer has the same weights they are in memory already.
    """
    name = "model.embed_tokens.weight"
    return checkpoint.rows(name) if checkpoint.device.type == "cpu" else checkpoint.load(name)


def _rotary_constants(info: TextInfo, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which position row each frequency turns with [head_dim / 2], and the frequencies [head_dim / 2]
    float32."""
    axes = torch.tensor(
        [axis for axis, length in enumerate(info.mrope_section) for _ in range(length)], device=device
    )
    frequencies = 1.0 / (
        info.rope_theta
        ** (torch.arange(0, info.head_dim, 2, dtype=torch.float32, device=device) / info.head_dim)
    )
    if len(axes) != len(frequencies):
        raise ValueError(
            f"mrope_section {info.mrope_section} adds up to {len(axes)}, the head has {len(frequencies)} "
            "frequencies"
        )
    return axes, frequencies
