"""Weights in 4 bits, activations in 8, quantised at load from a dense checkpoint. On the CPU.

The layers are those of `int8.py`. Of 32 inputs each, an output has a step and a zero, which make its weights
whole numbers of 8 bits times the output's own scale: products are those of int8, and only what is read from
memory is half as much.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from workers.nn.native import operators
from workers.nn.native.int4 import dequantized, pack_int4
from workers.nn.native.quantized_panels import quantized_kernels
from workers.nn.weights.base import Linear
from workers.nn.weights.int8 import Int8, PanelLinear, make_int8_linear


def make_int4_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Where this processor has no kernel for 4 bits, the weight is rounded to 4 and kept in 8: torch's own
    products of 4 bits are slower than dense ones, but for a single row in bfloat16."""
    if quantized_kernels() and weight.dtype in operators.IS_HALF:
        return PanelLinear(pack_int4(weight), bias)
    return make_int8_linear(dequantized(weight), bias)


class Int4(Int8):
    name: ClassVar[str] = "int4"

    def __init__(self) -> None:
        super().__init__(make_int4_linear)
