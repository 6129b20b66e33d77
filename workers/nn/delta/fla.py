"""The rule for longer parts by flash-linear-attention (Yang and Zhang 2024), in the Triton way's layer.

The convolution stays with the kernels of `triton.py`, which read and write states by slot. So does a step of
one token each: the package takes states side by side, and copies of them would triple what such a step reads
and writes. Written against fla-core 0.6.0. Never run on a GPU so far: tests use a fake package.
"""

from __future__ import annotations

from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from torch import Tensor

from workers.nn.delta.plan import Spans
from workers.nn.delta.triton import TritonDeltaNet
from workers.nn.native.operators import DeltaRows


class FlaDeltaNet(TritonDeltaNet):
    __slots__ = ()

    def compute_chunks(self, mixed: Tensor, rows: DeltaRows, memory: Tensor, spans: Spans) -> None:
        """Chunks begin at the step's first token of each sequence, not at multiples of the whole sequence."""
        size = self.num_key_heads * self.key_dim
        q, k, v = mixed.split((size, size, mixed.shape[1] - 2 * size), dim=1)
        fade, share = self.gates(rows)
        found, after = chunk_gated_delta_rule(
            *(part.unflatten(1, (self.num_key_heads, self.key_dim))[None] for part in (q, k)),
            v.unflatten(1, (self.num_value_heads, self.value_dim))[None],
            fade[None],
            share[None],
            scale=1.0,  # queries have that of the attention
            initial_state=memory[spans.slots],
            output_final_state=True,
            cu_seqlens=spans.starts,
            cu_seqlens_cpu=spans.starts_on_host,
        )
        memory[spans.slots] = after
        rows.out.copy_(self.gated(found[0].float(), rows.z))
