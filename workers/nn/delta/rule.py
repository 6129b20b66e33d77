"""The gated delta rule (Yang et al. 2024, "Gated Delta Networks"), in float32. The state S [key_dim,
value_dim] of a head is a memory that answers a key k with kᵀS. A token lets it fade by e^g, and moves what it
answers to the token's key towards the token's value by a share β:

    S ← e^g S;  S ← S + k ⊗ β (v − kᵀS);  output qᵀS

`advance` does this for one token. `compute_chunk` does it for a chunk of tokens at once. Its products between
tokens need no state, so `prepare_chunks` makes them for many chunks together: what the tokens of a chunk
write into the state solves a triangular system, since each of them sees what those before it have written.

Consecutive value heads share a key head.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.native import operators

# What has faded further is nothing. Without a limit there would be numbers near the smallest of float32, with
# which processors compute many times slower.
FADED, TINY = -40.0, 1e-17
LENGTH_EPS = 1e-6


class DeltaTokens(NamedTuple):
    """Of some tokens, all float32. Keys have length 1, queries that of the attention's scale."""

    q: Tensor  # [n, key_heads, key_dim]
    k: Tensor  # [n, key_heads, key_dim]
    v: Tensor  # [n, value_heads, value_dim]
    fade: Tensor  # [n, value_heads]: g, at most 0
    share: Tensor  # [n, value_heads]: β


class Chunks(NamedTuple):
    """Of chunks of `size` tokens, by value head."""

    asks: Tensor  # [chunks, heads, 2 · size, key_dim]: what the state is asked by writes, then by queries
    values: Tensor  # [chunks, heads, size, value_dim]: what would be written if nothing were there
    solver: Tensor  # [chunks, heads, size, size]: the inverse of the triangular system
    scores: Tensor  # [chunks, heads, size, size]: how far each token's output takes each token's write
    keys: Tensor  # [chunks, heads, size, key_dim]: faded up to the end of the chunk
    fades: Tensor  # [chunks, heads, 1, 1]: of the state, from the start of the chunk to its end


def unit_heads(x: Tensor, scale: float = 1.0) -> Tensor:
    """Each head [..., dim] divided by its length, times `scale`."""
    dim = x.shape[-1]
    return F.rms_norm(x, (dim,), _constant(dim, scale * dim**-0.5, x.device), LENGTH_EPS / dim)


def advance(state: Tensor, one: DeltaTokens) -> Tensor:
    """One token each of n sequences; updates their states [n, value_heads, key_dim, value_dim] in place.

    Returns their outputs [n, value_heads, value_dim].
    """
    num_heads = one.v.shape[1]
    asked = torch.stack((_for_values(one.k, num_heads), _for_values(one.q, num_heads)), dim=2)
    fade = _faded(one.fade)[..., None]
    answers = asked.flatten(0, 1).bmm(state.flatten(0, 1)).view(*asked.shape[:3], -1).mul_(fade[..., None])
    write = (one.v - answers[:, :, 0]).mul_(one.share[..., None])
    state.mul_(fade[..., None])
    state.flatten(0, 1).baddbmm_(asked.flatten(0, 1)[:, :1].mT, write.flatten(0, 1)[:, None])
    overlap = (one.q * one.k).sum(dim=-1)  # a token's output takes its own write, too
    return answers[:, :, 1].addcmul_(write, _for_values(overlap[..., None], num_heads))


def advance_slots(memory: Tensor, slots: Tensor, one: DeltaTokens) -> Tensor:
    """As `advance`, for states memory[slots] of distinct slots [n], on the CPU. They stay in place: the state
    of a sequence fits the processor's cache."""
    if operators.takes_delta(memory):
        return operators.delta_step(memory, slots, *one[:3], _faded(one.fade), one.share)
    parts = [
        advance(memory[slot : slot + 1], DeltaTokens(*(part[row : row + 1] for part in one)))
        for row, slot in enumerate(slots.tolist())
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def prepare_chunks(tokens: DeltaTokens, size: int) -> Chunks:
    """Of n = chunks · size tokens. Padding has share 0 and fade 0: it writes nothing and changes nothing."""
    num_heads = tokens.v.shape[1]
    q, k, v = (_by_head(part, size) for part in tokens[:3])  # [chunks, heads, size, dim]
    fade, share = (part.view(-1, size, num_heads).mT for part in tokens[3:])  # [chunks, heads, size]
    total = fade.cumsum(dim=-1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill_(_later(size, v.device), -torch.inf)
    between = _faded(between)  # how far the writes of each token have faded for each token
    since, to_end = _faded(total)[..., None], _faded(total[..., -1:] - total)[..., None]
    group, share = num_heads // k.shape[1], share[..., None]
    # [chunks, heads, 2 · size, size]
    of_keys, of_queries = _repeat(torch.cat((k, q), dim=2) @ k.mT, group).split(size, dim=2)
    system = (of_keys * between).mul_(share)
    k, q = _repeat(k, group), _repeat(q, group)
    asks = k.new_empty(*k.shape[:2], 2 * size, k.shape[3])
    torch.mul(k, since * share, out=asks[:, :, :size])
    torch.mul(q, since, out=asks[:, :, size:])
    unit = _unit(size, v.device).expand_as(system)
    solver = torch.linalg.solve_triangular(system, unit, upper=False, unitriangular=True)
    solver = F.hardshrink(solver, TINY)
    return Chunks(asks, v.mul_(share), solver, of_queries * between, k * to_end, since[:, :, -1:])


def compute_chunk(state: Tensor, chunk: Chunks) -> Tensor:
    """One chunk each of n sequences; updates their states [n, value_heads, key_dim, value_dim] in place.

    Returns their outputs [n, value_heads, size, value_dim].
    """
    size = chunk.values.shape[2]
    asks, values, solver, scores, keys = (part.flatten(0, 1) for part in chunk[:5])
    answers = torch.bmm(asks, state.flatten(0, 1))
    writes = torch.bmm(solver, values - answers[:, :size])
    state.mul_(chunk.fades)
    state.flatten(0, 1).baddbmm_(keys.mT, writes)
    out: Tensor = torch.baddbmm(answers[:, size:], scores, writes)
    return out.view_as(chunk.values)


def _faded(logarithm: Tensor) -> Tensor:
    return logarithm.masked_fill(logarithm < FADED, -torch.inf).exp_()


def _by_head(x: Tensor, size: int) -> Tensor:
    """[chunks, heads, size, dim], contiguous, of [chunks · size, heads, dim]."""
    by_head: Tensor = x.unflatten(0, (-1, size)).transpose(1, 2).contiguous()
    return by_head


def _for_values(x: Tensor, num_heads: int) -> Tensor:
    """Of each value head's key head, for x [n, key_heads, …]."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _repeat(x: Tensor, group: int) -> Tensor:
    """[chunks, value_heads, …] of [chunks, key_heads, …]"""
    return x if group == 1 else x.repeat_interleave(group, dim=1)


@functools.lru_cache(64)
def _later(size: int, device: torch.device) -> Tensor:
    """[size, size] bool: whether the token of the column is behind the token of the row."""
    return torch.ones(size, size, dtype=torch.bool, device=device).triu_(1)


@functools.lru_cache(64)
def _unit(size: int, device: torch.device) -> Tensor:
    return torch.eye(size, device=device)


@functools.lru_cache(64)
def _constant(size: int, value: float, device: torch.device) -> Tensor:
    return torch.full((size,), value, device=device)
