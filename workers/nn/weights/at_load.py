"""Dense weights that are quantised as they are loaded, into the layout that all devices compute.

    int4  4 bits, with a scale and a zero for each 128 inputs of an output
    int8  8 bits, with a scale for each 128 inputs of an output
    fp8   e4m3, with a scale for each output

For GPUs, and for CPUs with `--activation-quantization none`: else `int8.py` and `int4.py` have layouts of a
CPU's own, with activations in 8 bits. FP8 is for both.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.fused import Kernels
from workers.nn.loader import Checkpoint
from workers.nn.weights.base import Activations, Experts, Linear
from workers.nn.weights.dense import Dense, StoredExperts
from workers.nn.weights.experts import put_together
from workers.nn.weights.grouped import (
    CHUNK,
    Arrangement,
    GroupedLinear,
    GroupedWeight,
    NumberKind,
    choose_product,
)
from workers.nn.weights.shard import ExpertsShard

PART_NUMBERS = 1 << 24  # that are quantised at a time
LARGEST = {NumberKind.INT4: 15.0, NumberKind.INT8: 127.0, NumberKind.FP8: 448.0}
SMALLEST_SCALE = 1e-12  # of a group of zeros


class GroupedAtLoad(Dense):
    """Reads and shards the checkpoint's tensors like dense ones."""

    def __init__(self, kind: NumberKind) -> None:
        super().__init__(self._make_linear)
        self._kind, self._activations = kind, Activations.AUTO

    def choose_activations(self, activations: Activations) -> None:
        if activations is Activations.INT8 and self._kind is NumberKind.FP8:
            raise ValueError(
                "activation_quantization 'int8' is for weights that are whole numbers, not for those in FP8"
            )
        self._activations = activations

    def _make_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        choose = partial(choose_product, activations=self._activations)
        return GroupedLinear(quantized(weight, self._kind), bias, choose)

    def experts(
        self, checkpoint: Checkpoint, module: str, shard: ExpertsShard, kernels: Kernels | None
    ) -> Experts:
        layers = self.expert_layers(StoredExperts(checkpoint, module, shard), shard)
        return put_together(layers, shard.held.start, kernels)


def quantized(weight: Tensor, kind: NumberKind) -> GroupedWeight:
    """A weight [out, in] to the nearest numbers."""
    out_features, in_features = weight.shape
    size = in_features if kind is NumberKind.FP8 else CHUNK
    arrangement = Arrangement(torch.arange(in_features) // size)
    made = arrangement.empty(kind, out_features, kind is NumberKind.INT4, weight.device)
    for start in range(0, out_features, step := max(1, PART_NUMBERS // in_features)):
        rows = slice(start, min(start + step, out_features))
        wide = F.pad(weight[rows].float(), (0, -in_features % size)).view(rows.stop - start, -1, size)
        numbers, scales, zeros = _rounded(wide, kind)
        of_zeros = None if zeros is None else zeros.to(torch.uint8)
        arrangement.put(made, rows, numbers.view(len(wide), -1)[:, :in_features], scales, of_zeros)
    return made


def _rounded(wide: Tensor, kind: NumberKind) -> tuple[Tensor, Tensor, Tensor | None]:
    """Numbers, and scales and zeros of each group, of float32 [n, groups, size]."""
    if kind is NumberKind.INT4:
        least, most = wide.amin(dim=2).clamp_(max=0), wide.amax(dim=2).clamp_(min=0)
        scales = ((most - least) / LARGEST[kind]).clamp_(min=SMALLEST_SCALE)
        zeros = (-least / scales).round_()
        numbers = (wide / scales[..., None]).round_().add_(zeros[..., None]).clamp_(0, LARGEST[kind])
        return numbers.to(torch.uint8), scales, zeros
    scales = (wide.abs().amax(dim=2) / LARGEST[kind]).clamp_(min=SMALLEST_SCALE)
    scaled = wide / scales[..., None]
    if kind is NumberKind.INT8:
        return scaled.round_().to(torch.int8), scales, None
    return scaled.clamp_(-LARGEST[kind], LARGEST[kind]).to(torch.float8_e4m3fn), scales, None
