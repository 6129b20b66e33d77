"""A layer of Gated DeltaNet token by token in float64, which its kernels are compared with."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.delta.layer import DeltaStates, GatedDeltaNet
from workers.nn.delta.plan import plan_step

plan_spans = partial(plan_step, has_spans=True)


class DeltaShape(NamedTuple):
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    num_taps: int = 4

    @property
    def num_channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    def make_net(self, kind: type[GatedDeltaNet], device: str = "cpu") -> GatedDeltaNet:
        generator = torch.Generator().manual_seed(1)
        heads = self.value_heads
        return kind(
            num_key_heads=self.key_heads,
            num_value_heads=heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            taps=torch.randn(self.num_taps, self.num_channels, generator=generator).to(device),
            decay=(torch.rand(heads, generator=generator) * 2).to(device),
            bias=torch.randn(heads, generator=generator).to(device),
            gain=(torch.rand(self.value_dim, generator=generator) + 0.5).to(device),
            eps=1e-6,
        )


class LayerInputs(NamedTuple):
    """A sequence's inputs of the layer."""

    x: Tensor
    z: Tensor
    b: Tensor
    a: Tensor

    def at(self, rows: slice | Tensor) -> LayerInputs:
        return LayerInputs(*(part[rows] for part in self))


def make_inputs(
    shape: DeltaShape, num_tokens: int, dtype: torch.dtype, seed: int = 2, device: str = "cpu"
) -> LayerInputs:
    generator = torch.Generator().manual_seed(seed)
    widths = shape.num_channels, shape.value_heads * shape.value_dim
    projected = torch.randn(num_tokens, sum(widths), generator=generator).to(device, dtype)
    gates = torch.randn(num_tokens, 2 * shape.value_heads, generator=generator).to(device, dtype)
    return LayerInputs(*projected.split(widths, dim=1), *gates.chunk(2, dim=1))


def make_layer_states(
    shape: DeltaShape, num_slots: int, dtype: torch.dtype, device: str = "cpu"
) -> DeltaStates:
    """Of sequences that have gone on for long. A slot's states lie side by side, as the runner keeps them."""
    generator = torch.Generator().manual_seed(3)
    kept = (shape.num_taps - 1, shape.num_channels)
    memory = (shape.value_heads, shape.key_dim, shape.value_dim)
    sizes = [-(-kept[0] * kept[1] * dtype.itemsize // 64) * 64, 4 * memory[0] * memory[1] * memory[2]]
    whole = torch.zeros(num_slots, sum(sizes), dtype=torch.uint8, device=device)
    first, second = whole.split(sizes, dim=1)
    inputs = first[:, : kept[0] * kept[1] * dtype.itemsize].view(dtype).unflatten(1, kept)
    states = DeltaStates(inputs, second.view(torch.float32).unflatten(1, memory))
    for tensor in states:
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return states


def copied(states: DeltaStates) -> DeltaStates:
    """Laid out alike."""
    made = (
        torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device=part.device)
        for part in states
    )
    return DeltaStates(*(new.copy_(part) for new, part in zip(made, states, strict=True)))


def token_by_token(net: GatedDeltaNet, rows: LayerInputs, states: DeltaStates, slot: int) -> Tensor:
    """[num_tokens, value_heads · value_dim] float64; updates the states of the slot, in their types."""
    x, z, b, a = (part.double() for part in rows)
    seen = torch.cat((states.inputs[slot].double(), x))
    taps, num_taps = net.taps.double(), len(net.taps)
    convolved = sum(taps[tap] * seen[tap : tap + len(x)] for tap in range(num_taps))
    assert isinstance(convolved, Tensor)
    size = net.num_key_heads * net.key_dim
    q, k, v = F.silu(convolved).split((size, size, seen.shape[1] - 2 * size), dim=1)
    q, k = (_unit(part.unflatten(1, (net.num_key_heads, -1)), net.num_value_heads) for part in (q, k))
    v, share = v.unflatten(1, (net.num_value_heads, -1)), b.sigmoid()
    fade = (-net.decay.double() * F.softplus(a + net.bias.double())).exp()
    memory, found = states.memory[slot].double(), []
    for token in range(len(x)):
        memory = memory * fade[token, :, None, None]
        answer = torch.einsum("hk,hkv->hv", k[token], memory)
        write = (v[token] - answer) * share[token, :, None]
        memory = memory + k[token, :, :, None] * write[:, None]
        found.append(torch.einsum("hk,hkv->hv", q[token], memory) * net.key_dim**-0.5)
    states.inputs[slot] = seen[len(x) :].to(states.inputs.dtype)
    states.memory[slot] = memory.float()
    normed = F.rms_norm(torch.stack(found), (net.value_dim,), net.gain.double(), net.eps)
    return normed.flatten(1) * F.silu(z)


def _unit(x: Tensor, num_heads: int) -> Tensor:
    """Of each value head's key head."""
    unit = x * (x.square().sum(dim=-1, keepdim=True) + 1e-6).rsqrt()
    return unit.repeat_interleave(num_heads // x.shape[1], dim=1)
