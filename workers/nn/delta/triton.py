"""Gated DeltaNet in Triton: the GPU's way. Runs on the CPU, for tests, under Triton's interpreter.

A step of one token each is one kernel, which reads and writes fixed addresses only. Longer parts are computed
in chunks, by the chunked form of the rule (`rule.py`): what needs no state for all chunks at once, then the
state through the chunks of each sequence, then the outputs of all chunks. In float32, products of such a size
find no room in registers: one kernel walks through the tokens. Never run on a GPU so far.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from workers.nn.delta.layer import DeltaStates, GatedDeltaNet
from workers.nn.delta.plan import CHUNK, DeltaPlan, DraftLayout, Prefill, Spans
from workers.nn.delta.rule import LENGTH_EPS
from workers.nn.delta.triton_kernels import (
    MIN_DOT,
    delta_convolve_kernel,
    delta_decode_kernel,
    delta_keep_kernel,
    delta_output_kernel,
    delta_recur_kernel,
    delta_solve_kernel,
    delta_walk_kernel,
    delta_write_kernel,
)
from workers.nn.native.operators import DeltaRows

KEEP_BLOCK = 1024  # channels of one program
CONVOLVED_ROWS = 16  # of one program
VALUE_BLOCK = 32  # columns of the state in one program
STEP_WARPS = 8  # where a program has the whole state of a head
# More of them would leave no room for a second program on a multiprocessor.
RECUR_STAGES = 2
WALKED = (torch.float32,)  # models' types


def choose_recur_warps(capability: tuple[int, int]) -> int:
    """Before Hopper (9.0) a thread of four warps has too few registers for its part of the state."""
    return 4 if capability >= (9, 0) else 8


class TritonDeltaNet(GatedDeltaNet):
    __slots__ = ()

    def decode(self, rows: DeltaRows, states: DeltaStates, plan: DeltaPlan) -> None:
        self._step(rows, states, plan.decode_slots)

    def draft(self, rows: DeltaRows, states: DeltaStates, layout: DraftLayout, are_distinct: bool) -> None:
        for of_round in layout.rounds:
            if of_round.sources is not None:
                for state in states:
                    state[of_round.targets] = state[of_round.sources]
            part = DeltaRows(*(tensor[of_round.tokens] for tensor in rows))
            self._step(part, states, of_round.targets)
            rows.out[of_round.tokens] = part.out

    def _step(self, rows: DeltaRows, states: DeltaStates, slots: Tensor) -> None:
        """One token each of the sequences with states in `slots`, which are updated in place."""
        delta_decode_kernel[(len(rows.x), self.num_key_heads)](
            rows.x, rows.z, rows.b, rows.a, slots, states.inputs, states.memory,
            self.taps, self.decay, self.bias, self.gain, rows.out, self.eps, LENGTH_EPS,
            rows.x.stride(0), rows.z.stride(0), rows.b.stride(0), rows.a.stride(0),
            states.inputs.stride(0), states.memory.stride(0), rows.out.stride(0),
            **self._key_shape, **self._value_shape, NUM_TAPS=len(self.taps), num_warps=STEP_WARPS,
        )  # fmt: skip

    def prefill(self, rows: DeltaRows, states: DeltaStates, prefill: Prefill) -> None:
        assert prefill.spans is not None
        mixed = self._convolve(rows, states.inputs, prefill.spans)
        if mixed.dtype in WALKED:
            self._walk(mixed, rows, states.memory, prefill.spans)
        else:
            self.compute_chunks(mixed, rows, states.memory, prefill.spans)

    def _walk(self, mixed: Tensor, rows: DeltaRows, memory: Tensor, spans: Spans) -> None:
        """As `compute_chunks`, token by token."""
        delta_walk_kernel[(len(spans.slots), self.num_value_heads)](
            mixed, rows.z, rows.b, rows.a, spans.slots, spans.starts, memory,
            self.decay, self.bias, self.gain, rows.out, self.eps,
            rows.z.stride(0), rows.b.stride(0), rows.a.stride(0), memory.stride(0), rows.out.stride(0),
            **self._key_shape, **self._value_shape, num_warps=STEP_WARPS,
        )  # fmt: skip

    def compute_chunks(self, mixed: Tensor, rows: DeltaRows, memory: Tensor, spans: Spans) -> None:
        """Fills `rows.out`. mixed: [num_tokens, channels] in the model's type: keys have length 1, queries
        that of the attention's scale."""
        num_tokens, dtype, device = len(mixed), mixed.dtype, mixed.device
        num_heads = self.num_value_heads
        totals = torch.empty(num_tokens, num_heads, device=device)
        writes = torch.empty(num_tokens, num_heads, self.value_dim, dtype=dtype, device=device)
        answers = torch.empty(writes.shape, device=device)
        solvers = torch.empty(num_tokens, num_heads, CHUNK, dtype=dtype, device=device)
        asks = torch.empty(num_tokens, num_heads, self.key_dim, dtype=dtype, device=device)
        chunks = spans.starts, spans.shifts, spans.sequences, spans.numbers
        options = {**self._key_shape, "SIZE": CHUNK}
        grid = (len(spans.numbers), num_heads)
        delta_solve_kernel[grid](
            mixed, rows.b, rows.a, *chunks, self.decay, self.bias, totals, solvers,
            rows.b.stride(0), rows.a.stride(0),
            **options, VALUE_DIM=self.value_dim,
        )  # fmt: skip
        delta_write_kernel[grid](
            mixed, rows.b, *chunks, totals, solvers, writes, asks, rows.b.stride(0),
            **options, **self._value_shape,
        )  # fmt: skip
        blocks = triton.cdiv(self.value_dim, VALUE_BLOCK)
        delta_recur_kernel[(len(spans.slots), num_heads, blocks)](
            mixed, spans.slots, spans.starts, spans.shifts, memory, totals, writes, asks, answers,
            memory.stride(0),
            **options, VALUE_DIM=self.value_dim, BLOCK=VALUE_BLOCK, num_stages=RECUR_STAGES,
            num_warps=choose_recur_warps(_capability(device)),
        )  # fmt: skip
        delta_output_kernel[grid](
            mixed, rows.z, *chunks, totals, writes, answers, self.gain, rows.out, self.eps,
            rows.z.stride(0), rows.out.stride(0),
            **options, **self._value_shape,
        )  # fmt: skip

    def _convolve(self, rows: DeltaRows, inputs: Tensor, spans: Spans) -> Tensor:
        """`mixed` of `compute_chunks`; then `inputs` keeps the last inputs of each sequence."""
        num_channels, num_taps = rows.x.shape[1], len(self.taps)
        mixed = torch.empty(len(rows.x), num_channels, dtype=rows.x.dtype, device=rows.x.device)
        num_heads = 2 * self.num_key_heads + self.num_value_heads
        delta_convolve_kernel[(len(spans.numbers), num_heads, CHUNK // CONVOLVED_ROWS)](
            rows.x, *spans[:5], inputs, self.taps, mixed, LENGTH_EPS, rows.x.stride(0), inputs.stride(0),
            KEY_HEADS=self.num_key_heads, GROUP=self.num_value_heads // self.num_key_heads,
            KEY_DIM=self.key_dim, VALUE_DIM=self.value_dim,
            DIM_PADDED=triton.next_power_of_2(max(self.key_dim, self.value_dim)),
            NUM_TAPS=num_taps, SIZE=CHUNK, ROWS=CONVOLVED_ROWS,
        )  # fmt: skip
        delta_keep_kernel[(len(spans.slots), triton.cdiv(num_channels, KEEP_BLOCK))](
            rows.x, spans.slots, spans.starts, inputs, rows.x.stride(0), inputs.stride(0),
            num_channels, num_taps - 1, KEEP_BLOCK,
        )  # fmt: skip
        return mixed

    @property
    def _key_shape(self) -> dict[str, int]:
        """Of the kernels' constants."""
        return {
            "KEY_HEADS": self.num_key_heads,
            "GROUP": self.num_value_heads // self.num_key_heads,
            "KEY_DIM": self.key_dim,
            "KEY_PADDED": _padded(self.key_dim),
        }

    @property
    def _value_shape(self) -> dict[str, int]:
        return {"VALUE_DIM": self.value_dim, "VALUE_PADDED": _padded(self.value_dim)}


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _padded(dim: int) -> int:
    return int(max(MIN_DOT.value, triton.next_power_of_2(dim)))
