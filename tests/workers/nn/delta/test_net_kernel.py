"""The compiled kernel of a layer of Gated DeltaNet beside torch's, and beside the rule token by token in
float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.workers.nn.native_versions import each_rows_version, each_version
from workers.nn.delta.layer import DeltaStates, GatedDeltaNet
from workers.nn.delta.plan import plan_step
from workers.nn.native import operators

__all__ = ["each_rows_version", "each_version"]
NUM_SLOTS, TAPS, SPACE = 5, 4, 16
pytestmark = pytest.mark.skipif(operators.kernels is None, reason="installed without a C++ compiler")


class Shape(NamedTuple):
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


class Part(NamedTuple):
    """Of a sequence in a slot: `count` tokens behind `start` ones."""

    slot: int
    start: int
    count: int


def make_net(shape: Shape, decay: float = 3.0) -> GatedDeltaNet:
    return GatedDeltaNet(
        num_key_heads=shape.key_heads,
        num_value_heads=shape.value_heads,
        key_dim=shape.key_dim,
        value_dim=shape.value_dim,
        taps=torch.randn(TAPS, shape.channels),
        decay=torch.rand(shape.value_heads) * decay,
        bias=torch.randn(shape.value_heads),
        gain=torch.rand(shape.value_dim) + 0.5,
        eps=1e-6,
    )


def make_states(shape: Shape, dtype: torch.dtype) -> DeltaStates:
    """Slots are strided: other states lie between them."""
    size = shape.value_heads * shape.key_dim * shape.value_dim
    memory = torch.randn(NUM_SLOTS, size + 32)[:, :size] * 0.1
    inputs = torch.randn(NUM_SLOTS, (TAPS - 1) * shape.channels + 8).to(dtype)
    return DeltaStates(
        inputs[:, :-8].unflatten(1, (TAPS - 1, -1)),
        memory.unflatten(1, (shape.value_heads, shape.key_dim, shape.value_dim)),
    )


def copy_of(states: DeltaStates) -> DeltaStates:
    return DeltaStates(*(part.clone() for part in states))


class Inputs(NamedTuple):
    """Of a layer. x and z are parts of wider rows, as the projection makes them."""

    x: Tensor
    z: Tensor
    b: Tensor
    a: Tensor

    @staticmethod
    def random(shape: Shape, count: int, dtype: torch.dtype) -> Inputs:
        width = shape.channels + shape.value_heads * shape.value_dim
        both = torch.randn(count, width + SPACE).to(dtype)[:, :width]
        gates = torch.randn(count, 2 * shape.value_heads).to(dtype).chunk(2, dim=1)
        return Inputs(both[:, : shape.channels], both[:, shape.channels :], *gates)

    @property
    def rows(self) -> operators.DeltaRows:
        return operators.DeltaRows(*self, torch.empty_like(self.z))


def run(net: GatedDeltaNet, inputs: Inputs, states: DeltaStates, parts: Sequence[Part]) -> Tensor:
    slots = torch.tensor([part.slot for part in parts])
    plan = plan_step(slots, [part.count for part in parts], [part.start for part in parts], TAPS - 1)
    return net(*inputs, states, plan)


def run_in_torch(net: GatedDeltaNet, inputs: Inputs, states: DeltaStates, parts: Sequence[Part]) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "takes_delta_net", lambda *_: False)
        return run(net, inputs, states, parts)


PARTS = [Part(4, 9, 1), Part(1, 0, 200), Part(3, 50, 3), Part(0, 63, 1), Part(2, 128, 78)]


@pytest.mark.usefixtures("each_version")
@pytest.mark.parametrize(
    "shape", [Shape(2, 4, 16, 48), Shape(1, 3, 32, 16), Shape(2, 2, 128, 128), Shape(1, 2, 48, 144)]
)
def test_chunks_in_float32_are_torchs(shape: Shape) -> None:
    torch.manual_seed(0)
    net, inputs = make_net(shape), Inputs.random(shape, 283, torch.float32)
    states = make_states(shape, torch.float32)
    wanted_states = copy_of(states)
    assert operators.takes_delta_net(inputs.rows, *states, TAPS)
    wanted = run_in_torch(net, inputs, wanted_states, PARTS)
    torch.testing.assert_close(run(net, inputs, states, PARTS), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(states.inputs, wanted_states.inputs)
    torch.testing.assert_close(states.memory, wanted_states.memory, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("each_version")
def test_keys_that_no_tile_holds_are_multiplied_in_float32() -> None:
    torch.manual_seed(1)
    shape = Shape(2, 4, 16, 48)
    net, inputs = make_net(shape), Inputs.random(shape, 283, torch.bfloat16)
    states = make_states(shape, torch.bfloat16)
    wanted_states = copy_of(states)
    wanted = run_in_torch(net, inputs, wanted_states, PARTS)
    torch.testing.assert_close(run(net, inputs, states, PARTS), wanted, rtol=2**-7, atol=1e-3)
    assert torch.equal(states.inputs, wanted_states.inputs)
    torch.testing.assert_close(states.memory, wanted_states.memory, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("each_version")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_draft_leaves_its_state_in_a_row_of_its_own(dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    shape = Shape(2, 4, 32, 48)
    net, inputs = make_net(shape), Inputs.random(shape, 82, dtype)
    states = DeltaStates(*(torch.cat((part, part)) for part in make_states(shape, dtype)))
    wanted_states = copy_of(states)
    counts, drafts = [1, 3, 3, 2, 73], [range(0), range(5, 7), range(8, 10), range(7, 8), range(0)]
    plan = plan_step(torch.tensor([3, 0, 4, 1, 2]), counts, [9, 70, 5, 64, 0], TAPS - 1, drafts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "takes_delta_net", lambda *_: False)
        wanted = net(*inputs, wanted_states, plan)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 2**-6, "atol": 1e-2}
    torch.testing.assert_close(net(*inputs, states, plan), wanted, **tolerance)
    assert torch.equal(states.inputs, wanted_states.inputs)
    torch.testing.assert_close(states.memory, wanted_states.memory, **tolerance)


@pytest.mark.usefixtures("each_version")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [Shape(1, 2, 128, 32), Shape(1, 2, 32, 128), Shape(1, 2, 64, 64)])
def test_nothing_is_written_behind_the_scratch(
    shape: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(7)
    net, inputs, states = make_net(shape), Inputs.random(shape, 70, dtype), make_states(shape, dtype)
    plan = plan_step(torch.tensor([1]), [70], [0], TAPS - 1)
    behind: list[Tensor] = []
    plain = torch.empty

    def empty(size: int, dtype: torch.dtype) -> Tensor:
        whole = plain(size + (1 << 16), dtype=dtype).fill_(7)
        behind.append(whole[size:])
        return whole

    weights = operators.DeltaWeights(net.taps, net.decay, net.bias, net.gain, net.eps, net.num_key_heads)
    sequences = plan.prefills[0].sequences
    assert sequences is not None
    rows = inputs.rows
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        operators.delta_net(rows, *states, sequences, weights)
    assert len(behind) == 1
    assert (behind[0] == 7).all()


def stepwise(net: GatedDeltaNet, inputs: Inputs, memory: Tensor) -> Tensor:
    """A sequence that begins, token by token in float64; memory [heads, key_dim, value_dim] float64 is
    updated. Without the norm's gate."""
    keys, heads = net.num_key_heads, net.num_value_heads
    rows = F.pad(inputs.x.double(), (0, 0, TAPS - 1, 0))
    mixed = F.silu(sum(rows[tap : tap + len(inputs.x)] * net.taps[tap].double() for tap in range(TAPS)))
    sizes = [keys * net.key_dim] * 2 + [heads * net.value_dim]
    q, k, v = (
        part.unflatten(1, (count, -1))
        for part, count in zip(mixed.split(sizes, 1), (keys, keys, heads), strict=True)
    )
    q, k = (part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for part in (q, k))
    q, k = ((part).repeat_interleave(heads // keys, dim=1) for part in (q * net.key_dim**-0.5, k))
    fade = (-net.decay.double() * F.softplus(inputs.a.double() + net.bias)).exp()
    share, out = inputs.b.double().sigmoid(), torch.empty_like(v)
    for token in range(len(v)):
        memory *= fade[token, :, None, None]
        answer = torch.einsum("hkv,hk->hv", memory, k[token])
        memory += k[token, :, :, None] * (share[token, :, None] * (v[token] - answer))[:, None]
        out[token] = torch.einsum("hkv,hk->hv", memory, q[token])
    normed = F.rms_norm(out, (net.value_dim,), net.gain.double(), net.eps)
    return normed.flatten(1) * F.silu(inputs.z.double())


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.usefixtures("each_rows_version")
@pytest.mark.parametrize("decay", [3.0, 0.02])
def test_products_in_bfloat16_do_not_drift(decay: float) -> None:
    """Over 4,000 tokens, in steps; with states that fade soon, and that keep nearly all."""
    torch.manual_seed(2)
    shape, length, step = Shape(1, 2, 128, 128), 4000, 1000
    net, inputs = make_net(shape, decay), Inputs.random(shape, length, torch.bfloat16)
    states = DeltaStates(*(part.zero_() for part in make_states(shape, torch.bfloat16)))
    memory = torch.zeros(shape.value_heads, shape.key_dim, shape.value_dim, dtype=torch.float64)
    wanted = stepwise(net, inputs, memory)
    for start in range(0, length, step):
        now = Inputs(*(part[start : start + step] for part in inputs))
        found = run(net, now, states, [Part(2, start, step)])
        assert error(found, wanted[start : start + step]) < 5e-3  # the outputs' rounding alone: 1.7e-3
    assert error(states.memory[2], memory) < 5e-3
    assert torch.equal(states.inputs[2], inputs.x[-3:])


@pytest.mark.usefixtures("each_rows_version")
def test_heads_of_all_sizes_in_bfloat16() -> None:
    torch.manual_seed(3)
    for shape in (Shape(1, 2, 32, 16), Shape(2, 6, 64, 48), Shape(1, 2, 96, 144)):
        net, inputs = make_net(shape), Inputs.random(shape, 283, torch.bfloat16)
        states = make_states(shape, torch.bfloat16)
        wanted_states = copy_of(states)
        wanted = run_in_torch(net, inputs, wanted_states, PARTS)
        assert error(run(net, inputs, states, PARTS), wanted.double()) < 1e-2
        assert torch.equal(states.inputs, wanted_states.inputs)
        assert error(states.memory, wanted_states.memory.double()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_depends_neither_on_others_nor_on_the_steps(dtype: torch.dtype) -> None:
    """To the last bit, if steps end where chunks do."""
    torch.manual_seed(4)
    shape = Shape(2, 4, 32, 32)
    net, inputs, states = make_net(shape), Inputs.random(shape, 300, dtype), make_states(shape, dtype)
    alone = copy_of(states)
    together = run(net, inputs, states, [Part(1, 0, 100), Part(3, 0, 200)])
    for start, count in ((0, 64), (64, 136)):
        rows = slice(100 + start, 100 + start + count)
        found = run(net, Inputs(*(part[rows] for part in inputs)), alone, [Part(3, start, count)])
        assert torch.equal(found, together[rows])
    assert torch.equal(alone.memory[3], states.memory[3])
    assert torch.equal(alone.inputs[3], states.inputs[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_fades_at_once_is_no_nan(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    shape = Shape(1, 2, 32, 32)
    net, inputs, states = make_net(shape), Inputs.random(shape, 130, dtype), make_states(shape, dtype)
    inputs.a.fill_(200.0)
    assert run(net, inputs, states, [Part(0, 0, 130)]).isfinite().all()
    assert states.memory[0].isfinite().all()


def test_what_no_vector_divides_is_torchs() -> None:
    def takes(shape: Shape, dtype: torch.dtype = torch.float32, num_taps: int = TAPS) -> bool:
        inputs = Inputs.random(shape, 2, dtype)
        return operators.takes_delta_net(inputs.rows, *make_states(shape, torch.float32), num_taps)

    assert takes(Shape(1, 1, 16, 16))
    assert not takes(Shape(1, 1, 8, 16))
    assert not takes(Shape(1, 1, 16, 24))
    assert not takes(Shape(1, 1, 16, 16), torch.bfloat16)
    assert not takes(Shape(1, 1, 16, 16), num_taps=3)
