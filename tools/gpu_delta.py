"""The part of `tools.gpu_check` about layers with linear attention (Gated DeltaNet)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.wire.packing import pack_int32
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.steps import SequenceStart, SequenceStep
from tools.gpu_parts import Machine, Row, captured
from tools.runners import BLOCK, open_runner, plan_of
from workers.llm.model_runner import ModelRunner
from workers.nn.delta.backends import BY_TORCH, DeltaBackend, choose_delta_backend, has_fla
from workers.nn.delta.layer import DeltaStates, GatedDeltaNet
from workers.nn.delta.plan import DeltaPlan, plan_step

MODEL = "qwen3.5-tiny"
NUM_LAYERS = 4  # in turn, so that no cache holds what is read
NUM_KEPT = 3  # inputs of the convolution
NUM_TOKENS = 12  # of an answer
MAX_ERROR = 0.02  # of what is computed in bfloat16, as a part of the whole


def delta(machine: Machine) -> Iterator[Row]:
    for name in _names(machine):
        bench = _Bench(machine, choose_delta_backend(name, machine.device))
        for batch in (2,) if machine.is_small else (1, 32, 256):
            yield bench.decode(batch)
        for length in (70,) if machine.is_small else (512, 2048):
            yield bench.error(length)
            yield bench.prefill(length)
    yield from _answers(machine)


def _names(machine: Machine) -> list[str]:
    if machine.device.type != "cuda":
        return ["torch"]
    return ["triton", "fla"] if has_fla() else ["triton"]


class _Bench:
    """Layers of the 0.8B, without their projections."""

    def __init__(self, machine: Machine, backend: DeltaBackend) -> None:
        self._machine, self._backend = machine, backend
        self._heads, self._dim = (2, 16) if machine.is_small else (16, 128)
        self._num_channels = 3 * self._heads * self._dim
        self._net, self._by_torch = self._make_net(backend.net), self._make_net(GatedDeltaNet)

    def _make_net(self, kind: type[GatedDeltaNet]) -> GatedDeltaNet:
        generator = torch.Generator().manual_seed(0)
        randn = functools.partial(torch.randn, generator=generator)
        parts = randn(NUM_KEPT + 1, self._num_channels) * 0.5, randn(self._heads).exp() * 0.1
        taps, decay, bias, gain = (
            part.to(self._machine.device) for part in (*parts, randn(self._heads), torch.ones(self._dim))
        )
        return kind(
            num_key_heads=self._heads, num_value_heads=self._heads, key_dim=self._dim, value_dim=self._dim,
            taps=taps, decay=decay, bias=bias, gain=gain, eps=1e-6,
        )  # fmt: skip

    def _inputs(self, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views of two matrices, as projections give them."""
        widths = self._num_channels, self._heads * self._dim
        made = functools.partial(torch.randn, device=self._machine.device, dtype=torch.bfloat16)
        b, a = made(num_tokens, 2 * self._heads).chunk(2, dim=1)
        x, z = made(num_tokens, sum(widths)).split(widths, dim=1)
        return x, z, b, a

    def _states(self, num_slots: int) -> DeltaStates:
        device = self._machine.device
        kept = torch.zeros(num_slots, NUM_KEPT, self._num_channels, dtype=torch.bfloat16, device=device)
        return DeltaStates(kept, torch.randn(num_slots, self._heads, self._dim, self._dim, device=device))

    def _seconds(self, run: Callable[[], object], is_graph: bool) -> float:
        is_cuda = self._machine.device.type == "cuda"
        return self._machine.seconds(captured(run) if is_cuda and is_graph else run) / NUM_LAYERS

    def decode(self, batch: int) -> Row:
        inputs, slots = self._inputs(batch), torch.arange(batch, device=self._machine.device)
        layers = [self._states(batch) for _ in range(NUM_LAYERS)]

        def run() -> None:
            plan = plan_step(slots, None, None, NUM_KEPT)
            for states in layers:
                self._net(*inputs, states, plan)

        seconds = self._seconds(run, is_graph=True)
        nbytes = 2 * sum(part.nbytes for part in layers[0])  # read and written
        what = f"{self._backend.name}, step of a layer with linear attention, batch {batch}"
        told, share = f"{seconds * 1e6:.1f} µs", nbytes / seconds / self._machine.rates["copy"]
        wanted = 0.6 if batch >= 32 else None  # fewer bytes are less than a kernel's start
        return Row(what, told, share, wanted, "bytes of the states over the copy rate")

    def error(self, length: int) -> Row:
        """A prompt in two steps, of which the first ends within a chunk, and a token behind it."""
        inputs, found = self._inputs(length), []
        for net, backend in ((self._net, self._backend), (self._by_torch, BY_TORCH)):
            states, parts, start = self._states(1), [], 0
            states.memory.zero_()
            slots = torch.zeros(1, dtype=torch.int64, device=self._machine.device)
            for stop in (length // 3, length - 1, length):
                x, z, b, a = (part[start:stop] for part in inputs)
                of_step = plan_step(slots, [stop - start], [start], NUM_KEPT, has_spans=backend.has_spans)
                parts.append(net(x, z, b, a, states, of_step))
                start = stop
            found.append(torch.cat([*parts, states.memory.flatten()[None, : parts[0].shape[1]]]).double())
        error = float((found[0] - found[1]).norm() / found[1].norm())
        what = f"{self._backend.name}, difference from torch's, {length} tokens"
        return Row(what, f"{error:.1e}", 1 - error, 1 - MAX_ERROR, "1, if there is no difference")

    def prefill(self, length: int) -> Row:
        inputs, slots = self._inputs(length), torch.zeros(1, dtype=torch.int64, device=self._machine.device)
        layers, seconds = [self._states(1) for _ in range(NUM_LAYERS)], []
        for net, backend in ((self._net, self._backend), (self._by_torch, BY_TORCH)):
            of_step = plan_step(slots, [length], [0], NUM_KEPT, has_spans=backend.has_spans)

            def run(net: GatedDeltaNet = net, of_step: DeltaPlan = of_step) -> None:
                for states in layers:
                    net(*inputs, states, of_step)

            seconds.append(self._seconds(run, is_graph=False))
        what = f"{self._backend.name}, {length} tokens of a layer with linear attention"
        told = f"{seconds[0] * 1e6:.1f} µs, torch {seconds[1] * 1e6:.1f} µs"
        return Row(what, told, seconds[1] / seconds[0], 2.0, "torch's operators")


def _answers(machine: Machine) -> Iterator[Row]:
    """Greedy tokens of a small model in float32: graphs and kernels beside neither."""
    folder, answers = machine.checkpoint(MODEL), []
    for name in ("torch", _names(machine)[0]):
        options: dict[str, Any] = {"cuda_graphs": name != "torch", "linear_attention": name}
        with open_runner(folder, machine.device, "float32", 3, **options) as runner:
            answers.append(_greedy(runner))
    same = sum(a == b for a, b in zip(*answers, strict=True))
    told = f"{same} of {len(answers[0])} answers of {NUM_TOKENS} tokens"
    yield Row(f"{MODEL}, graphs with kernels beside torch", told, same / len(answers[0]), 1.0, "the same")


def _greedy(runner: ModelRunner) -> list[list[int]]:
    """Of prompts of 1, 70 and 130 tokens, in one batch."""
    lengths, sampling = (1, 70, 130), SamplingParams(temperature=0, seed=1)
    blocks = 160 // BLOCK
    starts = [
        SequenceStart(
            slot, length, sampling, pack_int32([5 + (37 * number) % 300 for number in range(length)]),
            block_table=pack_int32(range(slot * blocks, (slot + 1) * blocks)),
        )
        for slot, length in enumerate(lengths)
    ]  # fmt: skip
    first = [SequenceStep(slot, length) for slot, length in enumerate(lengths)]
    tokens: list[list[int]] = [[] for _ in lengths]
    for step in range(NUM_TOKENS):
        sequences: Sequence[SequenceStep] = [SequenceStep(slot) for slot in range(len(lengths))]
        plan = plan_of(step, sequences if step else first, () if step else starts)
        for of_slot, new in zip(tokens, runner.launch(plan).result().token_ids, strict=True):
            of_slot.extend(new)
    return tokens
