"""A layer of Gated DeltaNet beside transformers' functions, through every cut of a sequence, in company."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from tests.workers.nn.delta.token_by_token import LayerInputs
from workers.nn.delta.layer import DeltaStates, GatedDeltaNet
from workers.nn.delta.plan import CHUNK, DeltaPlan, plan_step
from workers.nn.delta.rule import DeltaTokens, advance, compute_chunk, prepare_chunks, unit_heads

KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, TAPS = 2, 4, 16, 24, 4
CHANNELS = 2 * KEY_HEADS * KEY_DIM + VALUE_HEADS * VALUE_DIM
LENGTH, NUM_SLOTS = 150, 5


class Part(NamedTuple):
    """DeltaTokens [start, stop) of the sequence, in a slot."""

    slot: int
    start: int
    stop: int


@pytest.fixture(scope="module")
def net() -> GatedDeltaNet:
    generator = torch.Generator().manual_seed(1)
    return GatedDeltaNet(
        num_key_heads=KEY_HEADS,
        num_value_heads=VALUE_HEADS,
        key_dim=KEY_DIM,
        value_dim=VALUE_DIM,
        taps=torch.randn(TAPS, CHANNELS, generator=generator),
        decay=torch.rand(VALUE_HEADS, generator=generator) * 3,
        bias=torch.randn(VALUE_HEADS, generator=generator),
        gain=torch.rand(VALUE_DIM, generator=generator) + 0.5,
        eps=1e-6,
    )


def make_rows(length: int = LENGTH) -> LayerInputs:
    generator = torch.Generator().manual_seed(2)
    widths = CHANNELS, VALUE_HEADS * VALUE_DIM, VALUE_HEADS, VALUE_HEADS
    return LayerInputs(*(torch.randn(length, width, generator=generator) for width in widths))


def make_states() -> DeltaStates:
    """Of sequences that begin; what other slots have must not matter."""
    inputs = torch.zeros(NUM_SLOTS, TAPS - 1, CHANNELS)
    return DeltaStates(inputs, torch.zeros(NUM_SLOTS, VALUE_HEADS, KEY_DIM, VALUE_DIM))


def plan_of(parts: Sequence[Part]) -> DeltaPlan:
    counts = [stop - start for _, start, stop in parts]
    return plan_step(torch.tensor([part.slot for part in parts]), counts, [part.start for part in parts], 3)


def run(net: GatedDeltaNet, rows: LayerInputs, states: DeltaStates, parts: Sequence[Part]) -> list[Tensor]:
    """One step; the output of each part."""
    taken = [torch.arange(start, stop) for _, start, stop in parts]
    out = net(*rows.at(torch.cat(taken)), states, plan_of(parts))
    return list(out.split([len(part) for part in taken]))


class Expected(NamedTuple):
    out: Tensor
    memory: Tensor


def expected(net: GatedDeltaNet, rows: LayerInputs, is_chunked: bool = True) -> Expected:
    """By transformers' functions."""
    taps = net.taps.T[:, None]
    convolved = F.conv1d(rows.x.T[None], taps, groups=CHANNELS, padding=TAPS - 1)[0, :, : len(rows.x)]
    sizes = KEY_HEADS * KEY_DIM, KEY_HEADS * KEY_DIM, VALUE_HEADS * VALUE_DIM
    q, k, v = F.silu(convolved).T[None].split(sizes, dim=-1)
    rule = torch_chunk_gated_delta_rule if is_chunked else torch_recurrent_gated_delta_rule
    out, memory = rule(
        *(part.unflatten(-1, (KEY_HEADS, KEY_DIM)) for part in (q, k)),
        v.unflatten(-1, (VALUE_HEADS, VALUE_DIM)),
        g=(-net.decay * F.softplus(rows.a + net.bias))[None],
        beta=rows.b.sigmoid()[None],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    gates = F.silu(rows.z).unflatten(1, (VALUE_HEADS, VALUE_DIM))
    gated = F.rms_norm(out[0], (VALUE_DIM,), net.gain, net.eps) * gates
    return Expected(gated.flatten(1), memory[0])


@pytest.mark.parametrize("cut", [1, 7, CHUNK - 1, CHUNK, CHUNK + 1, LENGTH])
def test_every_cut_gives_what_transformers_computes(cut: int, net: GatedDeltaNet) -> None:
    rows, states = make_rows(), make_states()
    starts = range(0, LENGTH, cut)
    parts = [run(net, rows, states, [Part(3, start, min(start + cut, LENGTH))])[0] for start in starts]
    wanted = expected(net, rows)
    torch.testing.assert_close(torch.cat(parts), wanted.out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states.memory[3], wanted.memory, rtol=1e-5, atol=1e-5)
    assert torch.equal(states.inputs[3], rows.x[-3:])
    assert not states.memory[:3].any(), "of other sequences"


def test_sequences_of_all_lengths_share_steps(net: GatedDeltaNet) -> None:
    rows, states = make_rows(), make_states()
    wanted = expected(net, rows).out
    steps = [
        [Part(0, 0, 1), Part(1, 0, 2), Part(2, 0, 100), Part(3, 0, 70)],
        [Part(1, 2, 3), Part(0, 1, 2), Part(3, 70, 71), Part(2, 100, 150)],
        [Part(0, 2, 150), Part(4, 0, 150), Part(1, 3, 150), Part(3, 71, 150)],
    ]
    for parts in steps:
        for part, found in zip(parts, run(net, rows, states, parts), strict=True):
            torch.testing.assert_close(found, wanted[part.start : part.stop], rtol=1e-4, atol=1e-4)


def test_a_step_on_the_device_is_one_on_the_host(net: GatedDeltaNet) -> None:
    """Without counts, as in a CUDA graph; padding rows share a slot."""
    rows, (host, device) = make_rows(), (make_states(), make_states())
    slots = torch.tensor([2, 0, 4, 4])
    for start in range(3):
        taken = rows.at(torch.tensor([start, start + 9, 0, 0]))
        on_host = net(*taken.at(torch.arange(2)), host, plan_step(slots[:2], [1, 1], [start, start], 3))
        on_device = net(*taken, device, plan_step(slots, None, None, 3))
        torch.testing.assert_close(on_device[:2], on_host, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(device.memory[:4], host.memory[:4], rtol=1e-5, atol=1e-5)


def test_cuts_are_at_multiples_of_the_whole_sequence(net: GatedDeltaNet) -> None:
    """So that a sequence that is computed again in steps of another size is cut alike: to the last bit."""
    rows, (first, again) = make_rows(), (make_states(), make_states())
    run(net, rows, first, [Part(0, 0, 128)])
    for start in (0, 64):
        run(net, rows, again, [Part(0, start, start + 64)])
    assert torch.equal(first.memory, again.memory)
    (prefill,) = plan_of([Part(0, 50, 150)]).prefills
    chunks = prefill.chunks
    assert [group.tokens for group in chunks.groups] == [slice(0, 100)]
    assert [group.rounds for group in chunks.groups] == [[1, 1, 1]], "14, 64 and 22 tokens"


def test_drafts_leave_each_state_as_a_step_of_its_own_would(net: GatedDeltaNet) -> None:
    """Whichever of them are right. Others decode and prefill beside them. Not to the last bit: softplus
    of another number of rows rounds otherwise."""
    rows = make_rows()
    plain = [make_states() for _ in range(2)]
    for states in plain:
        run(net, rows, states, [Part(slot, 0, 20 + slot) for slot in range(4)])
    one_by_one, together = plain
    wanted, states_behind = [], []
    for token in range(5):
        found = run(
            net, rows, one_by_one, [Part(slot, 20 + slot + token, 21 + slot + token) for slot in (1, 2)]
        )
        wanted.append(found)
        states_behind.append(DeltaStates(*(part.clone() for part in one_by_one)))
    parts = [Part(0, 20, 21), Part(1, 21, 26), Part(2, 22, 24), Part(3, 23, 60)]
    drafts = [range(0), range(5, 9), range(9, 10), range(0)]
    spare = DeltaStates(*(torch.cat((part, torch.full_like(part, 9.0))) for part in together))
    taken = torch.cat([torch.arange(part.start, part.stop) for part in parts])
    counts = [part.stop - part.start for part in parts]
    slots, starts = torch.tensor([part.slot for part in parts]), [part.start for part in parts]
    out = net(*rows.at(taken), spare, plan_step(slots, counts, starts, 3, drafts)).split(counts)
    for slot, of_drafts in ((1, drafts[1]), (2, drafts[2])):
        for number, place in enumerate([slot, *of_drafts]):
            torch.testing.assert_close(out[slot][number], wanted[number][slot - 1][0], rtol=1e-5, atol=1e-6)
            for part, expected_part in zip(spare, states_behind[number], strict=True):
                torch.testing.assert_close(part[place], expected_part[slot], rtol=1e-5, atol=1e-6)
    alone = run(net, rows, together, [Part(0, 20, 21)]), run(net, rows, together, [Part(3, 23, 60)])
    for place, (found,) in zip((0, 3), alone, strict=True):
        torch.testing.assert_close(out[place], found)
        torch.testing.assert_close(spare.memory[place], together.memory[place])


def test_states_inside_a_step_are_copied(net: GatedDeltaNet) -> None:
    """Those of steps that end there; other sequences are in the same calls."""
    rows, (whole, cut) = make_rows(), (make_states(), make_states())
    parts = [Part(0, 0, 1), Part(1, 0, 150), Part(2, 0, 70), Part(3, 0, 140)]
    taken = rows.at(torch.cat([torch.arange(part.start, part.stop) for part in parts]))
    slots, counts = torch.tensor([part.slot for part in parts]), [part.stop for part in parts]
    spare = torch.zeros_like(whole.memory[:3]), torch.zeros_like(whole.inputs[:3])
    whole = DeltaStates(torch.cat((whole.inputs, spare[1])), torch.cat((whole.memory, spare[0])))
    saves = [[], [(64, 5), (128, 7)], [], [(64, 6)]]
    plan = plan_step(slots, counts, [0] * 4, 3, None, saves)
    assert len(plan.prefills) == 4
    found = net(*taken, whole, plan)
    wanted = expected(net, rows).out
    for of_part, part in zip(found.split(counts), parts, strict=True):
        torch.testing.assert_close(of_part, wanted[: part.stop], rtol=1e-4, atol=1e-4)
    for slot, stop, row in ((1, 64, 5), (3, 64, 6), (1, 128, 7)):
        run(net, rows, cut, [Part(slot, stop - 64, stop)])
        torch.testing.assert_close(whole.memory[row], cut.memory[slot], rtol=1e-5, atol=1e-5)
        assert torch.equal(whole.inputs[row], cut.inputs[slot])


def random_tokens(length: int) -> DeltaTokens:
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(length, *shape, generator=generator)

    q, k = (unit_heads(randn(KEY_HEADS, 32)) for _ in range(2))
    fade = -F.softplus(randn(VALUE_HEADS)) * 0.2
    return DeltaTokens(q * 32**-0.5, k, randn(VALUE_HEADS, 32), fade, randn(VALUE_HEADS).sigmoid())


def test_both_forms_agree_over_4000_tokens() -> None:
    length = 63 * CHUNK
    tokens = random_tokens(length)
    states = torch.zeros(2, 1, VALUE_HEADS, 32, 32)
    chunks = prepare_chunks(tokens, CHUNK)
    in_chunks = [
        compute_chunk(states[0], type(chunks)(*(part[number : number + 1] for part in chunks)))[0].mT
        for number in range(length // CHUNK)
    ]
    one_by_one = [
        advance(states[1], DeltaTokens(*(part[number : number + 1] for part in tokens)))
        for number in range(length)
    ]
    found = torch.cat([part.permute(2, 0, 1) for part in in_chunks])
    torch.testing.assert_close(found, torch.cat(one_by_one), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-4)


def test_equal_keys_do_no_harm() -> None:
    """All tokens of a chunk write to one place: the system that is solved is far from the unit matrix."""
    tokens = random_tokens(CHUNK)
    tokens = tokens._replace(k=tokens.k[:1].expand_as(tokens.k).contiguous(), fade=tokens.fade * 0)
    tokens = tokens._replace(share=torch.ones_like(tokens.share))
    states = torch.zeros(2, 1, VALUE_HEADS, 32, 32)
    found = compute_chunk(states[0], prepare_chunks(tokens, CHUNK))[0].transpose(0, 1)
    one_by_one = [
        advance(states[1], DeltaTokens(*(part[row : row + 1] for part in tokens))) for row in range(CHUNK)
    ]
    torch.testing.assert_close(found, torch.cat(one_by_one), rtol=1e-4, atol=1e-4)


def test_what_fades_at_once_is_no_nan() -> None:
    tokens = random_tokens(CHUNK)
    tokens = tokens._replace(fade=torch.full_like(tokens.fade, -60.0))
    state = torch.ones(1, VALUE_HEADS, 32, 32)
    assert compute_chunk(state, prepare_chunks(tokens, CHUNK)).isfinite().all()
    assert state.isfinite().all()
