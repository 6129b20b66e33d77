"""Keys and values in 8 bits (`--kv-cache-dtype`): each head of each token has a scale of its own.

A key is written once and read by all later tokens, so its scale is taken from its own numbers: nothing is
calibrated, and a channel that is large in one token costs no other token its digits. A scale is a float32
beside the head's numbers: 3 % more with heads of 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

LEAST = 1e-30  # of a head's largest number: a head of zeros has a scale above zero
SCALE_BYTES = 4


class KvFormat(NamedTuple):
    name: str
    dtype: torch.dtype
    largest: float  # what the largest number of a head becomes
    loss: str  # what it cost the embedded model, as docs/quantization.md has it

    def quantize(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of this type in the shape of the rows [..., head_dim], and scales [...] in float32.

        A head with a number that is not finite has such a scale, too: what reads it is not finite.
        """
        wide = rows.float()
        most = wide.abs().amax(dim=-1).clamp_min(LEAST)
        numbers = wide * (self.largest / most)[..., None]
        if self.dtype is torch.int8:
            numbers.round_()
        return numbers.to(self.dtype), most / self.largest

    def dequantize(self, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        return (numbers.float() * scales[..., None]).to(dtype)


PAGE = "docs/quantization.md"
INT8 = KvFormat("int8", torch.int8, 127.0, f"a KL of 0.00006 nats and 1 answer of 632: {PAGE}")
FP8 = KvFormat("fp8", torch.float8_e4m3fn, 448.0, f"a KL of 0.00217 nats and 1 answer of 632: {PAGE}")
# By the option `--kv-cache-dtype`; `auto` has none: keys and values are in the model's type.
FORMATS: Mapping[str, KvFormat] = {"int8": INT8, "fp8": FP8, "fp8_e4m3": FP8}
