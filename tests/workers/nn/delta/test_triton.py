"""The Triton kernels of Gated DeltaNet in the interpreter, against the rule token by token in float64."""

from __future__ import annotations

import importlib.metadata
import itertools
import sys
import types
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.workers.nn.delta.token_by_token import (
    DeltaShape,
    LayerInputs,
    copied,
    make_inputs,
    make_layer_states,
    plan_spans,
    token_by_token,
)
from workers.llm.backends import choose_backend
from workers.nn.delta import triton as delta_triton
from workers.nn.delta.backends import BY_TORCH, choose_delta_backend
from workers.nn.delta.layer import DeltaStates, GatedDeltaNet
from workers.nn.delta.plan import plan_step
from workers.nn.delta.triton import TritonDeltaNet

pytestmark = pytest.mark.interpreter

# Two value heads for a key head, and dimensions that are no powers of two.
SHAPES = [DeltaShape(1, 2, 16, 32), DeltaShape(2, 4, 8, 24)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # of norms; the first is of float32 itself
NUM_SLOTS = 5


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies the bits of bfloat16 as if they were whole numbers."""
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: object, a: object, b: object, *others: object) -> object:
        return plain(self, _widened(a), _widened(b), *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def _widened(tensor: object) -> object:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    if tensor.dtype.scalar != tl.bfloat16:  # type: ignore[attr-defined]
        return tensor
    bits = tensor.data.astype(np.uint32) << 16  # type: ignore[attr-defined]
    return TensorHandle(bits.view(np.float32), tl.float32)


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, too, where errors of the form would show that bfloat16 hides."""
    monkeypatch.setattr(delta_triton, "WALKED", ())


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


class Case:
    """A net, and a step of sequences in slots 3, 0, 4, …, whose states are there already."""

    def __init__(
        self, shape: DeltaShape, counts: Sequence[int], starts: Sequence[int], dtype: torch.dtype
    ) -> None:
        self.net = shape.make_net(TritonDeltaNet)
        self.slots, self.counts, self.starts = torch.tensor([3, 0, 4][: len(counts)]), counts, starts
        self.rows = make_inputs(shape, sum(counts), dtype)
        self.states = make_layer_states(shape, NUM_SLOTS, dtype)

    def run(self, states: DeltaStates) -> Tensor:
        plan = plan_spans(self.slots, self.counts, self.starts, len(self.net.taps) - 1)
        return self.net(*self.rows, states, plan)

    def expected(self, states: DeltaStates) -> Tensor:
        first, found = 0, []
        for slot, count in zip(self.slots.tolist(), self.counts, strict=True):
            found.append(token_by_token(self.net, self.rows.at(slice(first, first + count)), states, slot))
            first += count
        return torch.cat(found)


def check(case: Case, tolerance: float) -> None:
    found, expected = copied(case.states), copied(case.states)
    out, wanted = case.run(found), case.expected(expected)
    assert out.dtype is case.rows.x.dtype
    assert error(out, wanted) < tolerance
    assert error(found.memory, expected.memory) < tolerance
    assert torch.equal(found.inputs, expected.inputs)
    others = [slot for slot in range(NUM_SLOTS) if slot not in case.slots]
    assert torch.equal(found.memory[others], case.states.memory[others])


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("count", [1, 7, 63, 64, 65, 130])
def test_chunks_of_all_lengths(count: int, dtype: torch.dtype) -> None:
    """Behind a decode, and beside a sequence that begins in the middle of a chunk."""
    check(Case(SHAPES[0], [1, count, 5], [9, 64, 61], dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("count", [1, 65])
def test_walks_through_tokens(count: int) -> None:
    check(Case(SHAPES[0], [1, count, 5], [9, 64, 61], torch.float32), TOLERANCE[torch.float32])


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("counts", [(1, 1, 1), (5, 2)])
def test_heads_of_any_size(counts: tuple[int, ...]) -> None:
    check(Case(SHAPES[1], counts, [62] * len(counts), torch.float32), TOLERANCE[torch.float32])


def test_a_decode_is_a_prefill_of_one_token() -> None:
    case = Case(SHAPES[0], [1, 2], [5, 3], torch.float32)
    decoded, prefilled = copied(case.states), copied(case.states)
    out = case.run(decoded)
    # The other way round, the sequence with one token is none of the leading ones.
    order = torch.tensor([1, 2, 0])
    plan = plan_spans(case.slots.flip(0), [2, 1], [3, 5], 3)
    assert plan.num_decodes == 0
    again = case.net(*(part[order] for part in case.rows), prefilled, plan)
    torch.testing.assert_close(again, out[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prefilled.memory, decoded.memory, rtol=1e-5, atol=1e-5)
    assert torch.equal(prefilled.inputs, decoded.inputs)


def test_a_step_on_the_device_has_padding_rows_in_one_slot() -> None:
    case = Case(SHAPES[0], [1, 1, 1], [4, 5, 6], torch.float32)
    found, expected = copied(case.states), copied(case.states)
    slots = torch.tensor([2, 0, 4, 4, 4])
    rows = LayerInputs(*(torch.cat((part, part[:2])) for part in case.rows))
    out = case.net(*rows, found, plan_spans(slots, None, None, 3))
    for row, slot in enumerate((2, 0)):
        wanted = token_by_token(case.net, rows.at(slice(row, row + 1)), expected, slot)
        assert error(out[row : row + 1], wanted) < TOLERANCE[torch.float32]
    assert error(found.memory[:4], expected.memory[:4]) < TOLERANCE[torch.float32]
    assert torch.equal(found.inputs[:4], expected.inputs[:4])


def test_steps_of_another_size_give_the_same_bits() -> None:
    """As long as they end at multiples of a chunk of the whole sequence; in whatever company."""
    whole = Case(SHAPES[0], [100], [0], torch.bfloat16)
    once, again = copied(whole.states), copied(whole.states)
    out, parts = whole.run(once), []
    for start, stop in ((0, 64), (64, 100)):
        rows = whole.rows.at(slice(start, stop))
        company = make_inputs(SHAPES[0], 3, torch.bfloat16, seed=9)
        together = LayerInputs(*(torch.cat(pair) for pair in zip(company, rows, strict=True)))
        plan = plan_spans(torch.tensor([1, 3]), [3, stop - start], [7, start], 3)
        parts.append(whole.net(*together, again, plan)[3:])
    assert torch.equal(torch.cat(parts), out)
    assert torch.equal(again.memory[3], once.memory[3])


@pytest.mark.usefixtures("chunked")
def test_equal_keys_do_no_harm() -> None:
    """All tokens of a chunk write to one place, and nothing fades: powers of that system are past 10¹⁸."""
    case = Case(SHAPES[0], [64], [0], torch.float32)
    x, z, b, a = case.rows
    rows = LayerInputs(x[:1].expand_as(x).contiguous(), z, torch.full_like(b, 20.0), torch.full_like(a, -30))
    case.rows = rows
    check(case, 2e-5)


@pytest.mark.usefixtures("chunked")
def test_what_fades_at_once_is_no_nan() -> None:
    case = Case(SHAPES[0], [70], [0], torch.float32)
    case.rows = case.rows._replace(a=torch.full_like(case.rows.a, 200.0))
    check(case, TOLERANCE[torch.float32])


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As fla-core 0.6.0 documents it, computed token by token.

    q, k [1, T, H, K]; v [1, T, HV, V]; g, beta [1, T, HV], g a logarithm; initial_state [N, HV, K, V];
    cu_seqlens [N + 1] int64. Returns the outputs [1, T, HV, V] and the final states [N, HV, K, V] float32.
    """
    assert (use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval) == (False, False, False)
    assert not state_v_first
    assert chunk_indices is None
    assert q.dtype == k.dtype == v.dtype
    assert initial_state is not None
    assert initial_state.dtype == g.dtype == beta.dtype == torch.float32
    assert initial_state.is_contiguous()
    assert cu_seqlens is not None
    assert cu_seqlens_cpu is not None
    assert cu_seqlens.dtype == cu_seqlens_cpu.dtype == torch.int64
    assert torch.equal(cu_seqlens, cu_seqlens_cpu)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    group = v.shape[2] // q.shape[2]
    q, k = (part[0].double().repeat_interleave(group, dim=1) for part in (q, k))
    out, states = torch.empty_like(v), initial_state.double()
    for number, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        for token in range(start, stop):
            states[number] *= g[0, token].double().exp()[:, None, None]
            answer = torch.einsum("hk,hkv->hv", k[token], states[number])
            write = (v[0, token].double() - answer) * beta[0, token, :, None].double()
            states[number] += k[token, :, :, None] * write[:, None]
            out[0, token] = (torch.einsum("hk,hkv->hv", q[token], states[number]) * scale).to(out.dtype)
    return out, states.float() if output_final_state else None


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        module = types.ModuleType(name)
        module.__path__ = []
        module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]  # find_spec looks for it
        monkeypatch.setitem(sys.modules, name, module)
    module.chunk_gated_delta_rule = chunk_gated_delta_rule  # type: ignore[attr-defined]
    monkeypatch.setattr(importlib.metadata, "version", {"fla-core": "0.6.0"}.__getitem__)
    yield
    sys.modules.pop("workers.nn.delta.fla", None)


def test_drafts_leave_their_states_in_rows_of_their_own() -> None:
    """A decode, two sequences with drafts, and a prompt whose state is copied behind 27 of its tokens."""
    case = Case(SHAPES[0], [1, 3, 2, 70], [9, 64, 5, 37], torch.float32)
    states = make_layer_states(SHAPES[0], 10, torch.float32)
    slots, drafts = torch.tensor([0, 1, 2, 3]), [range(4, 4), range(4, 6), range(6, 7), range(7, 7)]
    of_step = case.counts, case.starts, 3, drafts, [(), (), (), [(27, 8)]]
    found, expected = copied(states), copied(states)
    out = case.net(*case.rows, found, plan_spans(slots, *of_step))
    by_torch = SHAPES[0].make_net(GatedDeltaNet)
    wanted = by_torch(*case.rows, expected, plan_step(slots, *of_step))
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.equal(expected.memory[4:9], states.memory[4:9])
    for state, right in zip(found, expected, strict=True):
        torch.testing.assert_close(state, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("fla", "chunked")
def test_flash_linear_attention_gets_what_it_documents(dtype: torch.dtype) -> None:
    backend = choose_delta_backend("fla", torch.device("cpu"))
    assert backend.has_spans
    case = Case(SHAPES[0], [1, 70, 3], [9, 64, 61], dtype)
    case.net = SHAPES[0].make_net(backend.net)
    assert type(case.net) is not TritonDeltaNet
    check(case, TOLERANCE[dtype])


@pytest.mark.usefixtures("fla")
@pytest.mark.parametrize(
    ("device", "capability", "has_fla", "chosen"),
    [
        ("cpu", None, True, "torch"),
        ("cuda", (9, 0), True, "fla"),
        ("cuda", (7, 5), True, "triton"),
        ("cuda", (9, 0), False, "triton"),
    ],
)
def test_what_is_chosen(
    device: str,
    capability: tuple[int, int] | None,
    has_fla: bool,
    chosen: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if not has_fla:
        monkeypatch.delitem(sys.modules, "fla")
    backend = choose_delta_backend("auto", torch.device(device))
    assert backend.name == chosen
    if chosen == "torch":
        assert (backend.net, backend.has_spans) == (GatedDeltaNet, False)
    else:
        assert issubclass(backend.net, TritonDeltaNet)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="'fla' needs the package flash-linear-attention"):
        choose_delta_backend("fla", cpu)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    for name in ("triton", "fla"):
        with pytest.raises(ValueError, match=f"linear_attention '{name}' needs a GPU, but this rank"):
            choose_delta_backend(name, cpu)


@pytest.mark.usefixtures("fla")
def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"capability 8\.0"):
        choose_delta_backend("fla", torch.device("cuda"))


@pytest.mark.usefixtures("fla")
def test_a_package_that_does_not_load_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delattr(sys.modules["fla.ops.gated_delta_rule"], "chunk_gated_delta_rule")
    sys.modules.pop("workers.nn.delta.fla", None)
    assert choose_delta_backend("auto", torch.device("cuda")).name == "triton"
    assert "flash-linear-attention does not load" in caplog.text


@pytest.mark.usefixtures("fla")
@pytest.mark.parametrize("version", ["0.5.9", "0.6.0", "0.10.1.dev3", "1.0rc1"])
def test_an_old_package_is_not_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would ignore what it does not know, and compute something else."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.metadata, "version", {"fla-core": version}.__getitem__)
    gpu = torch.device("cuda")
    if version != "0.5.9":
        assert choose_delta_backend("auto", gpu).name == "fla"
        return
    assert choose_delta_backend("auto", gpu).name == "triton"
    with pytest.raises(ValueError, match=r"version 0\.6 or later"):
        choose_delta_backend("fla", gpu)


def test_it_goes_with_other_kernels() -> None:
    cpu = torch.device("cpu")
    for attention in ("torch", "auto"):
        with pytest.raises(ValueError, match="linear_attention 'triton' goes with attention 'triton' or"):
            choose_backend(attention, cpu, "triton")
    kernels = choose_backend("triton", cpu, "triton").kernels
    assert kernels is not None
    assert kernels.linear_attention.net is TritonDeltaNet
    kernels = choose_backend("triton", cpu).kernels
    assert kernels is not None
    assert kernels.linear_attention == BY_TORCH
