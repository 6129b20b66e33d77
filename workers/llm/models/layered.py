"""Decoders of one kind of layer, attention and then an MLP: how a layer is built, and the loop over layers.

A decoder says in its class what its attention has, and makes the MLP of each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from pipeline.families import TextInfo
from workers.llm.attention.base import AttentionLayer, AttentionStep, HeadNorm, Rotary
from workers.llm.cache.spec import CacheSpec, Paged
from workers.llm.cache.state_tensors import StepStates
from workers.llm.models.base import Decoder, Features
from workers.llm.models.mlp import Mlp
from workers.llm.models.rotary import mrope_constants
from workers.llm.models.stream import ResidualStream, make_stream
from workers.llm.models.vocabulary import Vocabulary
from workers.llm.parallel import HeadLayout, TensorParallel
from workers.nn.fused import Kernels
from workers.nn.layers import RMSNorm
from workers.nn.weights.base import Linear
from workers.nn.weights.weights import Weights


class LayerMlp(Protocol):
    """What follows a layer's attention."""

    def __call__(self, stream: ResidualStream, norm: RMSNorm) -> None:
        """Adds its output, of the normed stream, to the stream."""


class LayeredDecoder(Decoder):
    has_bias: ClassVar[bool] = False  # of queries, keys and values
    has_head_norm: ClassVar[bool] = False  # of queries and keys
    has_interleaved_axes: ClassVar[bool] = False  # see `mrope_constants`

    def __init__(
        self,
        info: TextInfo,
        weights: Weights,
        parallel: TensorParallel,
        kernels: Kernels | None = None,
    ) -> None:
        super().__init__(info, weights, parallel, kernels)
        self.heads = HeadLayout(info, parallel.rank, parallel.size)
        of_width = weights.of_width(info.hidden_size)
        self.layers = [
            self._make_layer(of_width.under(f"model.layers.{number}"), number)
            for number in range(info.num_layers)
        ]
        self.norm = RMSNorm(weights.tensor("model.norm.weight"), info.rms_norm_eps)
        self.vocabulary = Vocabulary(of_width, self.heads.vocab, info.vocab_size, info.tie_word_embeddings)
        self._axes, self._frequencies = mrope_constants(info, weights.device, self.has_interleaved_axes)

    @classmethod
    def spec_of(cls, info: TextInfo, tp_size: int) -> CacheSpec:
        heads = HeadLayout(info, 0, tp_size)
        return [Paged(heads.num_kv_heads, heads.head_dim)] * info.num_layers

    @property
    def attention_layers(self) -> Sequence[AttentionLayer]:
        return [layer.attention for layer in self.layers]

    def make_mlp(self, weights: Weights, number: int) -> LayerMlp:
        """The MLP of a layer, from the weights under `mlp`."""
        return Mlp(weights, self.heads.mlp, self.kernels)

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.vocabulary.embed(token_ids)

    @torch.inference_mode()
    def __call__(
        self,
        x: Tensor,
        positions: Tensor,
        attention: AttentionStep,
        features: Features | None = None,
        states: StepStates | None = None,
    ) -> Tensor:
        assert states is None, "no layer of this decoder keeps a state"
        rotary = attention.rotary(positions[self._axes].float().T * self._frequencies, x.dtype)
        stream = make_stream(x, self.parallel, self.kernels)
        for number, layer in enumerate(self.layers):
            layer(stream, attention, rotary)
            if features is not None and number < self.num_features:
                stream.add_rows(features.rows, features.values[:, number])
            if self.kernels is None:
                self.on_layer()
        return stream.normed(self.norm)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        return self.vocabulary.logits(hidden, out, self.parallel)

    def _make_layer(self, weights: Weights, number: int) -> _Layer:
        of_attention, heads, eps = weights.under("self_attn"), self.heads, self.info.rms_norm_eps
        modules, shards = ("q_proj", "k_proj", "v_proj"), (heads.query, heads.kv, heads.kv)
        bias = of_attention.bias(modules, shards) if self.has_bias else None
        norm = None
        if self.has_head_norm:
            of_queries, of_keys = (of_attention.tensor(f"{name}_norm.weight") for name in ("q", "k"))
            norm = HeadNorm(of_queries, of_keys, eps)
        has_kernels = self.kernels is not None
        attention = AttentionLayer(
            index=number,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            bias=bias if has_kernels else None,  # added by a kernel
            norm=norm,
        )
        return _Layer(
            attention=attention,
            qkv=of_attention.column(modules, shards, None if has_kernels else bias),
            o_proj=of_attention.row("o_proj", heads.query),
            mlp=self.make_mlp(weights.under("mlp"), number),
            input_norm=RMSNorm(weights.tensor("input_layernorm.weight"), eps),
            post_norm=RMSNorm(weights.tensor("post_attention_layernorm.weight"), eps),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    attention: AttentionLayer
    qkv: Linear
    o_proj: Linear
    mlp: LayerMlp
    input_norm: RMSNorm
    post_norm: RMSNorm

    def __call__(self, stream: ResidualStream, attention: AttentionStep, rotary: Rotary) -> None:
        x = stream.normed(self.input_norm)
        qkv = self.qkv(x).view(len(x), -1, self.attention.head_dim)
        attention.write(self.attention, qkv, rotary)
        stream.project(self.o_proj, attention.attend(self.attention, qkv).flatten(1))
        self.mlp(stream, self.post_norm)
