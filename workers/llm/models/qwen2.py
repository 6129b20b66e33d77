"""The decoder of Qwen2: attention with biases, a gated MLP, M-RoPE with contiguous sections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.families import TextInfo
from workers.llm.attention.base import AttentionLayer, AttentionStep, Rotary
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
from workers.nn.weights.weights import Weights


class Qwen2Decoder(Decoder):
    def __init__(
        self,
        info: TextInfo,
        weights: Weights,
        parallel: TensorParallel,
        kernels: Kernels | None = None,
    ) -> None:
        super().__init__(info, weights, parallel, kernels)
        self.heads = HeadLayout(info, parallel.rank, parallel.size)
        numbers = range(info.num_layers)
        of_layers = [weights.under(f"model.layers.{number}") for number in numbers]
        self.layers = [_Layer(info, of_layers[number], self.heads, kernels, number) for number in numbers]
        self.norm = RMSNorm(weights.tensor("model.norm.weight"), info.rms_norm_eps)
        self.vocabulary = Vocabulary(weights, self.heads.vocab, info.vocab_size, info.tie_word_embeddings)
        self._axes, self._frequencies = mrope_constants(info, weights.device)

    @classmethod
    def spec_of(cls, info: TextInfo, tp_size: int) -> CacheSpec:
        heads = HeadLayout(info, 0, tp_size)
        return [Paged(heads.num_kv_heads, heads.head_dim)] * info.num_layers

    @property
    def attention_layers(self) -> Sequence[AttentionLayer]:
        return [layer.attention for layer in self.layers]

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
        assert features is None, "embeddings of this decoder are as wide as its layers"
        assert states is None, "no layer of this decoder keeps a state"
        rotary = attention.rotary(positions[self._axes].float().T * self._frequencies, x.dtype)
        stream = make_stream(x, self.parallel, self.kernels)
        for layer in self.layers:
            layer(stream, attention, rotary)
            if self.kernels is None:
                self.on_layer()
        return stream.normed(self.norm)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        return self.vocabulary.logits(hidden, out, self.parallel)


DECODER = Qwen2Decoder


class _Layer:
    def __init__(
        self,
        info: TextInfo,
        weights: Weights,
        heads: HeadLayout,
        kernels: Kernels | None,
        index: int,
    ) -> None:
        of_attention = weights.under("self_attn")
        modules, shards = ("q_proj", "k_proj", "v_proj"), (heads.query, heads.kv, heads.kv)
        bias = of_attention.bias(modules, shards)
        has_kernels = kernels is not None
        self.qkv = of_attention.column(modules, shards, None if has_kernels else bias)
        self.o_proj = of_attention.row("o_proj", heads.query)
        self.attention = AttentionLayer(
            index=index,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            bias=bias if has_kernels else None,  # added by a kernel
        )
        self.mlp = Mlp(weights.under("mlp"), heads.mlp, kernels)
        self.input_norm = RMSNorm(weights.tensor("input_layernorm.weight"), info.rms_norm_eps)
        self.post_norm = RMSNorm(weights.tensor("post_attention_layernorm.weight"), info.rms_norm_eps)

    def __call__(self, stream: ResidualStream, attention: AttentionStep, rotary: Rotary) -> None:
        x = stream.normed(self.input_norm)
        qkv = self.qkv(x).view(len(x), -1, self.attention.head_dim)
        attention.write(self.attention, qkv, rotary)
        stream.project(self.o_proj, attention.attend(self.attention, qkv).flatten(1))
        self.mlp(stream, self.post_norm)
