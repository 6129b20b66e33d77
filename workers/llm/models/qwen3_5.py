"""The decoder of Qwen3.5, dense or with experts. Every fourth layer attends to all tokens, with a gate behind
its heads, of which only the first numbers are turned by positions. The others keep a state (Gated DeltaNet).

All norms but the one inside a state's layer have their weight stored minus one. It is put back in float32,
since the type of the model would round it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.families import TextInfo
from pipeline.families.qwen3_5 import DeltaNetInfo, Qwen3_5TextInfo
from pipeline.families.qwen3_vl import ExpertsInfo
from workers.llm.attention.base import AttentionLayer, AttentionStep, HeadNorm, Rotary
from workers.llm.cache.spec import CacheSpec, Paged, State
from workers.llm.cache.state_tensors import StepStates
from workers.llm.models.base import Decoder, Features
from workers.llm.models.experts import SharedExpertMlp
from workers.llm.models.layered import LayerMlp
from workers.llm.models.mlp import Mlp
from workers.llm.models.qwen3_5_mtp import Qwen3_5MtpHead
from workers.llm.models.rotary import mrope_constants
from workers.llm.models.stream import ResidualStream, make_stream
from workers.llm.models.vocabulary import Vocabulary
from workers.llm.parallel import HeadLayout, TensorParallel, share_experts
from workers.nn.delta.backends import BY_TORCH, DeltaBackend
from workers.nn.delta.layer import DeltaStates
from workers.nn.delta.plan import CHUNK, DeltaPlan, plan_step
from workers.nn.fused import Kernels, linear_attention_of
from workers.nn.layers import RMSNorm
from workers.nn.weights.base import Linear
from workers.nn.weights.dense import Dense
from workers.nn.weights.shard import WHOLE, ExpertsShard, Shard
from workers.nn.weights.weights import Weights

STATES_PER_LAYER = 2


class Qwen3_5Decoder(Decoder):
    prefill_multiple = CHUNK

    def __init__(
        self,
        info: TextInfo,
        weights: Weights,
        parallel: TensorParallel,
        kernels: Kernels | None = None,
    ) -> None:
        super().__init__(info, weights, parallel, kernels)
        assert isinstance(info, Qwen3_5TextInfo)
        self._info = info
        self._mtp_layers: Sequence[AttentionLayer] = ()
        self._linear_attention = linear_attention_of(kernels)
        self.heads = HeadLayout(info, parallel.rank, parallel.size)
        of_width = weights.of_width(info.hidden_size)
        self.layers = [
            self._make_layer(of_width.under(f"model.layers.{number}"), number)
            for number in range(info.num_layers)
        ]
        self.norm = _norm(weights, "model.norm", info.rms_norm_eps)
        self.vocabulary = Vocabulary(of_width, self.heads.vocab, info.vocab_size, info.tie_word_embeddings)
        self._axes, self._frequencies = mrope_constants(
            info, weights.device, has_interleaved_axes=True, rotary_dim=info.rotary_dim
        )

    @classmethod
    def spec_of(cls, info: TextInfo, tp_size: int) -> CacheSpec:
        assert isinstance(info, Qwen3_5TextInfo)
        heads, delta_net = HeadLayout(info, 0, tp_size), DeltaLayout(info.delta_net, 0, tp_size)
        paged = Paged(heads.num_kv_heads, heads.head_dim)
        spec: list[Paged | State] = []
        for number in range(info.num_layers):
            spec += [paged] if number in info.full_layers else delta_net.states
        return spec

    @classmethod
    def check_experts(cls, info: TextInfo, tp_size: int, has_whole_experts: bool) -> None:
        assert isinstance(info, Qwen3_5TextInfo)
        if info.experts is None:
            super().check_experts(info, tp_size, has_whole_experts)
        else:
            _share(info.experts, info, TensorParallel(0, tp_size, has_whole_experts=has_whole_experts))

    @classmethod
    def mtp_spec_of(cls, info: TextInfo, tp_size: int) -> CacheSpec:
        assert isinstance(info, Qwen3_5TextInfo)
        if info.num_mtp_layers != 1:
            raise ValueError(
                "speculative 'mtp' needs a head of one layer that predicts a further token: this checkpoint "
                f"has mtp_num_hidden_layers = {info.num_mtp_layers}"
            )
        heads = HeadLayout(info, 0, tp_size)
        return [Paged(heads.num_kv_heads, heads.head_dim)]

    def load_mtp(self, weights: Weights) -> None:
        of_mtp, eps = weights.under("mtp"), self._info.rms_norm_eps
        of_layer, index = (
            of_mtp.of_width(self._info.hidden_size).under("layers.0"),
            len(self._info.full_layers),
        )
        mixer = GatedAttention(self._info, of_layer.under("self_attn"), self.heads, self.parallel, index)
        layer = self._assemble(mixer, of_layer)
        self._mtp_layers = [mixer.layer]

        def compute(stream: ResidualStream, positions: Tensor, attention: AttentionStep) -> None:
            layer(stream, _Step(attention, self._rotary(positions, attention), None, None))

        self.mtp = Qwen3_5MtpHead(
            of_embedding=_norm(of_mtp, "pre_fc_norm_embedding", eps),
            of_hidden=_norm(of_mtp, "pre_fc_norm_hidden", eps),
            fc=of_mtp.column(("fc",), (WHOLE,)),
            make_stream=lambda x: make_stream(x, self.parallel, self.kernels),
            layer=compute,
            norm=_norm(of_mtp, "norm", eps),
        )

    @property
    def attention_layers(self) -> Sequence[AttentionLayer]:
        mixers = [layer.mixer for layer in self.layers]
        return [*(mixer.layer for mixer in mixers if isinstance(mixer, GatedAttention)), *self._mtp_layers]

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
        assert features is None, "this family has no deepstack"
        plan = None
        if states is not None:
            num_kept = self._info.delta_net.num_taps - 1
            of_step = states.slots, states.counts, states.starts
            has_spans = self._linear_attention.has_spans
            plan = plan_step(*of_step, num_kept, states.drafts, states.saves, has_spans)
        step = _Step(attention, self._rotary(positions, attention), states, plan)
        stream = make_stream(x, self.parallel, self.kernels)
        for layer in self.layers:
            layer(stream, step)
            if self.kernels is None:
                self.on_layer()
        return stream.normed(self.norm)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        return self.vocabulary.logits(hidden, out, self.parallel)

    def _rotary(self, positions: Tensor, attention: AttentionStep) -> Rotary:
        return attention.rotary(positions[self._axes].float().T * self._frequencies, self.dtype)

    def _make_layer(self, weights: Weights, number: int) -> _HybridLayer:
        info = self._info
        full_before = sum(1 for other in info.full_layers if other < number)
        mixer: GatedAttention | DeltaMixer
        if number in info.full_layers:
            mixer = GatedAttention(info, weights.under("self_attn"), self.heads, self.parallel, full_before)
        else:
            layout = DeltaLayout(info.delta_net, self.parallel.rank, self.parallel.size)
            first = STATES_PER_LAYER * (number - full_before)
            of_layer, backend = weights.under("linear_attn"), self._linear_attention
            mixer = DeltaMixer(layout, of_layer, first, info.rms_norm_eps, backend)
        return self._assemble(mixer, weights)

    def _assemble(self, mixer: GatedAttention | DeltaMixer, weights: Weights) -> _HybridLayer:
        info = self._info
        return _HybridLayer(
            mixer,
            self._make_mlp(weights.under("mlp")),
            _norm(weights, "input_layernorm", info.rms_norm_eps),
            _norm(weights, "post_attention_layernorm", info.rms_norm_eps),
        )

    def _make_mlp(self, weights: Weights) -> LayerMlp:
        experts = self._info.experts
        if experts is None:
            return Mlp(weights, self.heads.mlp, self.kernels)
        shard = _share(experts, self.info, self.parallel)
        return SharedExpertMlp(weights, shard, experts.num_chosen, self.heads.mlp, self.kernels)


DECODER = Qwen3_5Decoder


def _norm(weights: Weights, module: str, eps: float) -> RMSNorm:
    return RMSNorm(weights.wide_tensor(f"{module}.weight") + 1, eps)


def _share(experts: ExpertsInfo, info: TextInfo, parallel: TensorParallel) -> ExpertsShard:
    return share_experts(experts.num_experts, info.hidden_size, experts.intermediate_size, parallel)


@dataclass(frozen=True, slots=True)
class _Step:
    attention: AttentionStep
    rotary: Rotary
    states: StepStates | None  # None: no layer keeps one
    plan: DeltaPlan | None


@dataclass(frozen=True, slots=True)
class _HybridLayer:
    mixer: GatedAttention | DeltaMixer
    mlp: LayerMlp
    input_norm: RMSNorm
    post_norm: RMSNorm

    def __call__(self, stream: ResidualStream, step: _Step) -> None:
        self.mixer(stream, self.input_norm, step)
        self.mlp(stream, self.post_norm)


class GatedAttention:
    """Attention to all tokens, each head's output times the sigmoid of its gate."""

    def __init__(
        self,
        info: TextInfo,
        weights: Weights,
        heads: HeadLayout,
        parallel: TensorParallel,
        index: int,
    ) -> None:
        """`index`: among the layers with a paged cache."""
        q_gain, k_gain = (weights.wide_tensor(f"{name}_norm.weight") + 1 for name in ("q", "k"))
        self.layer = AttentionLayer(
            index=index,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            norm=HeadNorm(q_gain, k_gain, info.rms_norm_eps),
        )
        queries, gates = _queries_and_gates(info, parallel)
        self._qkv = weights.column(("q_proj", "k_proj", "v_proj"), (queries, heads.kv, heads.kv))
        self._gate = weights.column(("q_proj",), (gates,))
        self._out = weights.row("o_proj", heads.query)

    def __call__(self, stream: ResidualStream, norm: RMSNorm, step: _Step) -> None:
        """Adds its output, of the normed stream, to the stream."""
        x = stream.normed(norm)
        qkv, gate = self._qkv(x).view(len(x), -1, self.layer.head_dim), self._gate(x)
        step.attention.write(self.layer, qkv, step.rotary)
        attended = step.attention.attend(self.layer, qkv).flatten(1)
        stream.project(self._out, attended * gate.sigmoid_())


def _queries_and_gates(info: TextInfo, parallel: TensorParallel) -> tuple[Shard, Shard]:
    """The rows of a rank's heads in `q_proj`, which has the queries of a head and then its gates."""
    dim, count = info.head_dim, info.num_heads // parallel.size
    heads = range(parallel.rank * count, (parallel.rank + 1) * count)
    queries = tuple(slice(2 * head * dim, (2 * head + 1) * dim) for head in heads)
    gates = tuple(slice((2 * head + 1) * dim, (2 * head + 2) * dim) for head in heads)
    size = 2 * info.num_heads * dim
    return Shard(queries, size=size), Shard(gates, size=size)


class DeltaLayout:
    """What one rank holds of a layer with a state.

    Raises ValueError, with the numbers, for heads that the ranks do not divide.
    """

    def __init__(self, info: DeltaNetInfo, rank: int, size: int) -> None:
        # Value heads are a multiple of key heads, so they are divided, too, and meet their key heads.
        if info.num_key_heads % size:
            raise ValueError(
                f"tp {size} does not divide the model's {info.num_key_heads} key heads of linear attention"
            )
        self.info = info
        self.num_key_heads, self.num_value_heads = info.num_key_heads // size, info.num_value_heads // size
        keys, values = info.num_key_heads * info.key_dim, info.num_value_heads * info.value_dim
        (of_keys,) = Shard.split(keys, rank, size).slices
        self.values = Shard.split(values, rank, size)
        (of_values,) = self.values.slices
        self.value_heads = Shard.split(info.num_value_heads, rank, size)
        # Queries, keys and values lie one behind the other: a rank has its part of each.
        parts = ((of_keys, 0), (of_keys, keys), (of_values, 2 * keys))
        channels = tuple(slice(part.start + at, part.stop + at) for part, at in parts)
        self.channels = Shard(channels, size=2 * keys + values)
        self.num_channels = (2 * keys + values) // size

    @property
    def states(self) -> list[State]:
        """Of one layer, in the order of `DeltaStates`."""
        info = self.info
        inputs = State((info.num_taps - 1, self.num_channels), None)
        return [inputs, State((self.num_value_heads, info.key_dim, info.value_dim), torch.float32)]


class DeltaMixer:
    def __init__(
        self,
        layout: DeltaLayout,
        weights: Weights,
        first_state: int,
        eps: float,
        backend: DeltaBackend = BY_TORCH,
    ) -> None:
        """`first_state`: the number of its first state among all layers'."""
        self._first_state, self._num_channels = first_state, layout.num_channels
        modules, shards = ("in_proj_qkv", "in_proj_z"), (layout.channels, layout.values)
        self._in_proj: Linear = weights.column(modules, shards)
        # Few rows, in no format: an error in them would add up over all tokens behind.
        modules, shards = ("in_proj_b", "in_proj_a"), (layout.value_heads, layout.value_heads)
        gates = [weights.matrix(name, heads) for name, heads in zip(modules, shards, strict=True)]
        self._gates = weights.adapted(Dense().pack(torch.cat(gates), None), modules, shards)
        self._out_proj = weights.row("out_proj", layout.values)
        self._net = backend.net(
            num_key_heads=layout.num_key_heads,
            num_value_heads=layout.num_value_heads,
            key_dim=layout.info.key_dim,
            value_dim=layout.info.value_dim,
            taps=weights.wide_tensor("conv1d.weight", layout.channels)[:, 0].T.contiguous(),
            decay=weights.wide_tensor("A_log", layout.value_heads).exp(),
            bias=weights.wide_tensor("dt_bias", layout.value_heads),
            gain=weights.wide_tensor("norm.weight"),
            eps=eps,
        )

    def __call__(self, stream: ResidualStream, norm: RMSNorm, step: _Step) -> None:
        """Adds its output, of the normed stream, to the stream."""
        assert step.states is not None
        assert step.plan is not None
        x = stream.normed(norm)
        projected = self._in_proj(x)
        mixed, z = projected[:, : self._num_channels], projected[:, self._num_channels :]
        b, a = self._gates(x).chunk(2, dim=1)
        tensors = step.states.tensors[self._first_state : self._first_state + STATES_PER_LAYER]
        stream.project(self._out_proj, self._net(mixed, z, b, a, DeltaStates(*tensors), step.plan))
