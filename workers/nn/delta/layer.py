"""A layer of Gated DeltaNet between its projections: a short convolution over time, the delta rule, and a
norm with a gate. Two states: the last inputs of the convolution, and the memory of each head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.delta.plan import ChunkGroup, ChunkLayout, DeltaPlan, DraftLayout
from workers.nn.delta.rule import (
    Chunks,
    DeltaTokens,
    advance,
    advance_slots,
    compute_chunk,
    prepare_chunks,
    unit_heads,
)


class DeltaStates(NamedTuple):
    """By slot."""

    inputs: Tensor  # [num_slots, num_taps - 1, channels], in the model's type
    memory: Tensor  # [num_slots, value_heads, key_dim, value_dim] float32


class _Rows(NamedTuple):
    """Of some of the step's tokens."""

    x: Tensor  # [n, channels]
    z: Tensor  # [n, value_heads · value_dim]
    fade: Tensor  # [n, value_heads] float32
    share: Tensor  # [n, value_heads] float32
    out: Tensor  # [n, value_heads · value_dim], to be filled

    def part(self, part: slice) -> _Rows:
        return _Rows(*(tensor[part] for tensor in self))


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDeltaNet:
    """Weights are in float32. Channels are those of all queries, then of all keys, then of all values."""

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
        share, fade = b.float().sigmoid(), F.softplus(a.float() + self.bias).mul_(-self.decay)
        rows = _Rows(x, z, fade, share, torch.empty_like(z))
        first = plan.num_decodes
        if plan.num_decodes:
            self._decode(rows.part(slice(first)), states, plan)
        if plan.drafts is not None:
            start, first = first, first + plan.drafts.num_tokens
            self._draft(rows.part(slice(start, first)), states, plan.drafts, plan.are_distinct)
        if plan.chunks is not None:
            self._prefill(rows.part(slice(first, None)), states, plan.chunks)
        return rows.out

    def _decode(self, rows: _Rows, states: DeltaStates, plan: DeltaPlan) -> None:
        slots = plan.decode_slots
        seen = torch.cat((states.inputs[slots], rows.x[:, None].to(states.inputs.dtype)), dim=1)
        states.inputs[slots] = seen[:, 1:]
        tokens = self._tokens(seen.float().mul_(self.taps).sum(dim=1), rows.fade, rows.share)
        found = _advance(states.memory, slots, tokens, plan.are_distinct)
        rows.out.copy_(self._gated(found, rows.z))

    def _draft(self, rows: _Rows, states: DeltaStates, layout: DraftLayout, are_distinct: bool) -> None:
        """As `_decode` for one token after another: only the memory's steps have to wait for each other."""
        kept = states.inputs[layout.slots]
        edges = layout.edges.pick(rows.x, kept.flatten(0, 1)).unflatten(0, (-1, kept.shape[1]))
        seen = torch.cat((edges, rows.x[:, None]), dim=1).to(states.inputs.dtype)
        states.inputs[layout.targets] = seen[:, 1:]
        tokens = self._tokens(seen.float().mul_(self.taps).sum(dim=1), rows.fade, rows.share)
        found = torch.empty_like(tokens.v)
        for of_round in layout.rounds:
            if of_round.sources is not None:
                states.memory[of_round.targets] = states.memory[of_round.sources]
            taken = DeltaTokens(*(part[of_round.tokens] for part in tokens))
            found[of_round.tokens] = _advance(states.memory, of_round.targets, taken, are_distinct)
        rows.out.copy_(self._gated(found, rows.z))

    def _prefill(self, rows: _Rows, states: DeltaStates, layout: ChunkLayout) -> None:
        kept = states.inputs[layout.slots]
        num_kept = kept.shape[1]
        edges = layout.edges.pick(rows.x, kept.flatten(0, 1)).unflatten(0, (-1, num_kept))
        tails = layout.tails.pick(rows.x, kept.flatten(0, 1)).unflatten(0, (-1, num_kept))
        memory = states.memory[layout.slots]
        for group in layout.groups:
            tokens = self._chunk_tokens(rows, edges[group.chunks], group, layout.size)
            chunks, parts, first = prepare_chunks(tokens, layout.size), [], 0
            for count in group.rounds:
                of_round = Chunks(*(part[first : first + count] for part in chunks))
                parts.append(compute_chunk(memory[:count], of_round))
                first += count
            found = torch.cat(parts) if len(parts) > 1 else parts[0]  # [chunks, heads, size, value_dim]
            found = found.transpose(1, 2).flatten(0, 1)[group.places]
            rows.out[group.tokens] = self._gated(found, rows.z[group.tokens])
        states.inputs[layout.slots] = tails.to(states.inputs.dtype)
        states.memory[layout.slots] = memory

    def _chunk_tokens(self, rows: _Rows, edges: Tensor, group: ChunkGroup, size: int) -> DeltaTokens:
        """The tokens of a group of chunks, with padding. edges: the inputs before each chunk."""
        of_group = rows.x[group.rows].unflatten(0, (-1, size))
        seen = torch.cat((edges, of_group), dim=1).float()  # [chunks, num_kept + size, channels]
        num_taps = len(self.taps)
        convolved = seen[:, num_taps - 1 :] * self.taps[-1]
        for tap in range(num_taps - 1):
            convolved.addcmul_(seen[:, tap : tap + size], self.taps[tap])
        gates = rows.fade.new_zeros(2, seen.shape[0] * size, self.num_value_heads)
        gates[0, group.places] = rows.fade[group.tokens]
        gates[1, group.places] = rows.share[group.tokens]
        return self._tokens(convolved.flatten(0, 1), *gates)

    def _tokens(self, convolved: Tensor, fade: Tensor, share: Tensor) -> DeltaTokens:
        """convolved: [n, channels] float32, which is overwritten."""
        size = self.num_key_heads * self.key_dim
        q, k, v = F.silu(convolved, inplace=True).split((size, size, convolved.shape[1] - 2 * size), dim=1)
        q, k = (part.unflatten(1, (self.num_key_heads, self.key_dim)) for part in (q, k))
        v = v.unflatten(1, (self.num_value_heads, self.value_dim))
        return DeltaTokens(unit_heads(q, self.key_dim**-0.5), unit_heads(k), v, fade, share)

    def _gated(self, found: Tensor, z: Tensor) -> Tensor:
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
