"""A layer of Gated DeltaNet between its projections: a short convolution over time, the delta rule, and a
norm with a gate. Two states: the last inputs of the convolution, and the memory of each head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.delta.plan import ChunkGroup, DeltaPlan, DraftLayout, Prefill
from workers.nn.delta.rule import (
    Chunks,
    DeltaTokens,
    advance,
    advance_slots,
    compute_chunk,
    prepare_chunks,
    unit_heads,
)
from workers.nn.native import operators
from workers.nn.native.operators import DeltaRows, DeltaSequences, DeltaWeights


class DeltaStates(NamedTuple):
    """By slot."""

    inputs: Tensor  # [num_slots, num_taps - 1, channels], in the model's type
    memory: Tensor  # [num_slots, value_heads, key_dim, value_dim] float32


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaNet:
    """Weights are in float32. Channels are those of all queries, then of all keys, then of all values.

    Computes by torch's operators and, on the CPU, by the compiled kernel. Subclasses have other ways of
    `decode`, `draft` and `prefill`, which fill `rows.out` and update the states (`backends.py`).
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    taps: Tensor  # [num_taps, channels], the current token's last
    decay: Tensor  # [value_heads]: how fast the memory fades
    bias: Tensor  # [value_heads], of the fading
    gain: Tensor  # [value_dim], of the norm
    eps: float

    def __call__(
        self, x: Tensor, z: Tensor, b: Tensor, a: Tensor, states: DeltaStates, plan: DeltaPlan
    ) -> Tensor:
        """[num_tokens, value_heads · value_dim] in the type of x; updates the states of the step's sequences.

        x: [num_tokens, channels], z: [num_tokens, value_heads · value_dim], gates of the output. b and a:
        [num_tokens, value_heads], how far the memory is moved, and how far it fades.
        """
        rows = DeltaRows(x, z, b, a, z.new_empty(z.shape))
        first = plan.num_decodes
        if plan.num_decodes:
            self.decode(rows.part(slice(first)), states, plan)
        if plan.drafts is not None:
            of_drafts = rows.part(slice(first, first + plan.drafts.num_tokens))
            self.draft(of_drafts, states, plan.drafts, plan.are_distinct)
        for prefill in plan.prefills:
            self.prefill(rows.part(prefill.tokens), states, prefill)
            if prefill.targets is not None:
                for state in states:
                    state[prefill.targets] = state[prefill.sources]
        return rows.out

    def _runs(self, rows: DeltaRows, states: DeltaStates, sequences: DeltaSequences | None) -> bool:
        """Computes these sequences by a kernel. False: there is none for such tensors."""
        if sequences is None or not operators.takes_delta_net(rows, *states, len(self.taps)):
            return False
        weights = DeltaWeights(self.taps, self.decay, self.bias, self.gain, self.eps, self.num_key_heads)
        operators.delta_net(rows, *states, sequences, weights)
        return True

    def decode(self, rows: DeltaRows, states: DeltaStates, plan: DeltaPlan) -> None:
        """One token each of the sequences in `plan.decode_slots`."""
        if self._runs(rows, states, plan.sequences):
            return
        slots, (fade, share) = plan.decode_slots, self.gates(rows)
        seen = torch.cat((states.inputs[slots], rows.x[:, None].to(states.inputs.dtype)), dim=1)
        states.inputs[slots] = seen[:, 1:]
        tokens = self._tokens(seen.float().mul_(self.taps).sum(dim=1), fade, share)
        found = _advance(states.memory, slots, tokens, plan.are_distinct)
        rows.out.copy_(self.gated(found, rows.z))

    def draft(self, rows: DeltaRows, states: DeltaStates, layout: DraftLayout, are_distinct: bool) -> None:
        """As `decode` for one token after another: only the memory's steps have to wait for each other."""
        if self._runs(rows, states, layout.sequences):
            return
        kept = states.inputs[layout.slots]
        edges = layout.edges.pick(rows.x, kept.flatten(0, 1)).unflatten(0, (-1, kept.shape[1]))
        seen = torch.cat((edges, rows.x[:, None]), dim=1).to(states.inputs.dtype)
        states.inputs[layout.targets] = seen[:, 1:]
        tokens = self._tokens(seen.float().mul_(self.taps).sum(dim=1), *self.gates(rows))
        found = torch.empty_like(tokens.v)
        for of_round in layout.rounds:
            if of_round.sources is not None:
                states.memory[of_round.targets] = states.memory[of_round.sources]
            taken = DeltaTokens(*(part[of_round.tokens] for part in tokens))
            found[of_round.tokens] = _advance(states.memory, of_round.targets, taken, are_distinct)
        rows.out.copy_(self.gated(found, rows.z))

    def prefill(self, rows: DeltaRows, states: DeltaStates, prefill: Prefill) -> None:
        if self._runs(rows, states, prefill.sequences):
            return
        layout, gates = prefill.chunks, self.gates(rows)
        assert layout is not None
        kept = states.inputs[layout.slots]
        num_kept = kept.shape[1]
        edges = layout.edges.pick(rows.x, kept.flatten(0, 1)).unflatten(0, (-1, num_kept))
        tails = layout.tails.pick(rows.x, kept.flatten(0, 1)).unflatten(0, (-1, num_kept))
        memory = states.memory[layout.slots]
        for group in layout.groups:
            tokens = self._chunk_tokens(rows, gates, edges[group.chunks], group, layout.size)
            chunks, parts, first = prepare_chunks(tokens, layout.size), [], 0
            for count in group.rounds:
                of_round = Chunks(*(part[first : first + count] for part in chunks))
                parts.append(compute_chunk(memory[:count], of_round))
                first += count
            found = torch.cat(parts) if len(parts) > 1 else parts[0]  # [chunks, heads, size, value_dim]
            found = found.transpose(1, 2).flatten(0, 1)[group.places]
            rows.out[group.tokens] = self.gated(found, rows.z[group.tokens])
        states.inputs[layout.slots] = tails.to(states.inputs.dtype)
        states.memory[layout.slots] = memory

    def gates(self, rows: DeltaRows) -> tuple[Tensor, Tensor]:
        """`DeltaTokens.fade` and `share` [n, value_heads] float32."""
        return F.softplus(rows.a.float() + self.bias).mul_(-self.decay), rows.b.float().sigmoid()

    def _chunk_tokens(
        self, rows: DeltaRows, of_tokens: tuple[Tensor, Tensor], edges: Tensor, group: ChunkGroup, size: int
    ) -> DeltaTokens:
        """The tokens of a group of chunks, with padding. edges: the inputs before each chunk."""
        of_group = rows.x[group.rows].unflatten(0, (-1, size))
        seen = torch.cat((edges, of_group), dim=1).float()  # [chunks, num_kept + size, channels]
        num_taps = len(self.taps)
        convolved = seen[:, num_taps - 1 :] * self.taps[-1]
        for tap in range(num_taps - 1):
            convolved.addcmul_(seen[:, tap : tap + size], self.taps[tap])
        gates = seen.new_zeros(2, seen.shape[0] * size, self.num_value_heads)
        for padded, gate in zip(gates, of_tokens, strict=True):
            padded[group.places] = gate[group.tokens]
        return self._tokens(convolved.flatten(0, 1), *gates)

    def _tokens(self, convolved: Tensor, fade: Tensor, share: Tensor) -> DeltaTokens:
        """convolved: [n, channels] float32, which is overwritten."""
        size = self.num_key_heads * self.key_dim
        q, k, v = F.silu(convolved, inplace=True).split((size, size, convolved.shape[1] - 2 * size), dim=1)
        q, k = (part.unflatten(1, (self.num_key_heads, self.key_dim)) for part in (q, k))
        v = v.unflatten(1, (self.num_value_heads, self.value_dim))
        return DeltaTokens(unit_heads(q, self.key_dim**-0.5), unit_heads(k), v, fade, share)

    def gated(self, found: Tensor, z: Tensor) -> Tensor:
        """[n, value_heads · value_dim] of found [n, value_heads, value_dim]."""
        normed = F.rms_norm(found, self.gain.shape, self.gain, self.eps).flatten(1)
        return normed.mul_(F.silu(z.float())).to(z.dtype)


def _advance(memory: Tensor, slots: Tensor, tokens: DeltaTokens, are_distinct: bool) -> Tensor:
    """One token each of the sequences in `slots`; updates their memory."""
    if are_distinct:
        return advance_slots(memory, slots, tokens)
    of_slots = memory[slots]
    found = advance(of_slots, tokens)
    memory[slots] = of_slots
    return found
