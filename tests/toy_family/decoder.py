"""The toy's decoder: heads are normed, frequencies take turns at the three rows of positions, the second half
of an item's embeddings goes in behind the first layer, and one layer may keep a state (a fading memory).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.families import TextInfo
from tests.toy_family.family import ToyTextInfo
from workers.llm.attention.base import AttentionLayer, AttentionStep, HeadNorm, Rotary
from workers.llm.cache.spec import CacheSpec, Paged, State
from workers.llm.cache.state_tensors import StepStates
from workers.llm.models.base import Decoder, Features
from workers.llm.models.mlp import Mlp
from workers.llm.models.stream import ResidualStream, make_stream
from workers.llm.models.vocabulary import Vocabulary
from workers.llm.parallel import HeadLayout, TensorParallel
from workers.nn.fused import Kernels
from workers.nn.layers import RMSNorm
from workers.nn.weights.shard import Shard
from workers.nn.weights.weights import Weights

EPS = 1e-6


class ToyDecoder(Decoder):
    num_features = 1
    prefix = "mind."

    def __init__(
        self,
        info: TextInfo,
        weights: Weights,
        parallel: TensorParallel,
        kernels: Kernels | None = None,
    ) -> None:
        super().__init__(info, weights, parallel, kernels)
        assert isinstance(info, ToyTextInfo)
        heads = HeadLayout(info, parallel.rank, parallel.size)
        self.layers = [
            _Layer(info, weights.under(f"mind.layers.{number}"), heads, kernels, number)
            for number in range(info.num_layers)
        ]
        shard = Shard.split(info.hidden_size, parallel.rank, parallel.size)
        self.memory = _Memory(info, weights.under("mind.memory"), shard) if info.has_memory else None
        self.norm = RMSNorm(weights.tensor("mind.norm.weight"), EPS)
        self.vocabulary = Vocabulary(
            weights, heads.vocab, info.vocab_size, is_tied=False, table="mind.words.weight", head="mind.mouth"
        )
        numbers = torch.arange(info.head_dim // 2, device=weights.device)
        self._axes, self._frequencies = numbers % 3, info.rope_theta ** (-numbers / len(numbers))

    @classmethod
    def spec_of(cls, info: TextInfo, tp_size: int) -> CacheSpec:
        assert isinstance(info, ToyTextInfo)
        heads = HeadLayout(info, 0, tp_size)
        paged = [Paged(heads.num_kv_heads, heads.head_dim)] * info.num_layers
        return [*paged, State((info.hidden_size // tp_size,), torch.float32)] if info.has_memory else paged

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
        rotary = attention.rotary(positions[self._axes].float().T * self._frequencies, x.dtype)
        stream = make_stream(x, self.parallel, self.kernels)
        for number, layer in enumerate(self.layers):
            layer(stream, attention, rotary)
            if number == 0 and features is not None:
                stream.add_rows(features.rows, features.values[:, 0])
            if number == 0 and self.memory is not None:
                assert states is not None
                self.memory(stream, states)
            if self.kernels is None:
                self.on_layer()
        return stream.normed(self.norm)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        return self.vocabulary.logits(hidden, out, self.parallel)


DECODER = ToyDecoder


class _Layer:
    def __init__(
        self, info: TextInfo, weights: Weights, heads: HeadLayout, kernels: Kernels | None, index: int
    ) -> None:
        self._qkv = weights.column(("q_proj", "k_proj", "v_proj"), (heads.query, heads.kv, heads.kv))
        self._o_proj = weights.row("o_proj", heads.query)
        of_heads = [weights.tensor(f"{name}_norm.weight") for name in ("q", "k")]
        self.attention = AttentionLayer(
            index=index,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
            norm=HeadNorm(*of_heads, EPS),
        )
        self._mlp = Mlp(weights.under("mlp"), heads.mlp, kernels)
        self._norms = [RMSNorm(weights.tensor(f"{name}.weight"), EPS) for name in ("norm1", "norm2")]

    def __call__(self, stream: ResidualStream, attention: AttentionStep, rotary: Rotary) -> None:
        x = stream.normed(self._norms[0])
        qkv = self._qkv(x).view(len(x), -1, self.attention.head_dim)
        attention.write(self.attention, qkv, rotary)
        stream.project(self._o_proj, attention.attend(self.attention, qkv).flatten(1))
        self._mlp(stream, self._norms[1])


class _Memory:
    """state = decay · state + write(x), token by token; the stream gets read(silu(gate(x)) · state).

    Each rank has a part of the state.
    """

    def __init__(self, info: TextInfo, weights: Weights, shard: Shard) -> None:
        self._norm = RMSNorm(weights.tensor("norm.weight"), EPS)
        self._write_gate = weights.column(("write", "gate"), (shard, shard))
        self._read = weights.row("read", shard)
        self._decay = weights.tensor("decay.weight", shard).float()

    def __call__(self, stream: ResidualStream, states: StepStates) -> None:
        write, gate = self._write_gate(stream.normed(self._norm)).chunk(2, dim=-1)
        seen = self._remember(write.float(), states).to(gate.dtype)
        stream.project(self._read, F.silu(gate) * seen)

    def _remember(self, write: Tensor, states: StepStates) -> Tensor:
        (memory,) = states.tensors
        if states.counts is None:  # each sequence has one token: all of it on the device
            memory[states.slots] = seen = memory[states.slots] * self._decay + write
            return seen
        parts: list[Tensor] = []
        drafts = states.drafts or [range(0)] * len(states.slots)
        saves = states.saves or [()] * len(states.slots)
        slots, of_slots = states.slots.tolist(), write.split(list(states.counts))
        for slot, of_slot, behind_drafts, copies in zip(slots, of_slots, drafts, saves, strict=True):
            place, copied = slot, dict(copies)
            targets = [*[slot] * (len(of_slot) - len(behind_drafts)), *behind_drafts]
            for number, (row, target) in enumerate(zip(of_slot, targets, strict=True), start=1):
                memory[target] = memory[place] * self._decay + row
                parts.append(memory[target].clone())
                if number in copied:
                    memory[copied[number]] = memory[target]
                place = target
        return torch.stack(parts)
