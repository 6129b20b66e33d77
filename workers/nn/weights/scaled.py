"""FP8 times FP8 by torch's scaled product (cuBLASLt, for Hopper GPUs), for many rows: of an FP8 weight whose
groups are of 128 inputs, as those of blocks of 128 × 128 are.

Activations are rounded to FP8 too, with a scale for each row and 128 inputs, as the makers of such
checkpoints compute. Whether a device has the product, and computes it right, is tried once, and logged. Never
run on a GPU.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.weights.grouped import CHUNK, GroupedWeight, NumberKind, arrange

logger = logging.getLogger(__name__)
LEAST_CAPABILITY = (9, 0)
MULTIPLE = 16  # of rows, since scales are read 16 bytes at a time; and of outputs
LARGEST = 448.0  # of FP8
SMALLEST_SCALE = 1e-12
MOST_ERROR = 0.01  # relative, of a product in bfloat16 whose factors are the same

# (x in FP8, its scales [rows, groups], weight): x Wᵀ in bfloat16.
Multiply = Callable[[Tensor, Tensor, GroupedWeight], Tensor]


def multiply_scaled(numbers: Tensor, scales: Tensor, weight: GroupedWeight) -> Tensor:
    """By torch. The scales of either side are read with those of one group side by side."""
    recipe = F.ScalingType.BlockWise1x128
    out: Tensor = F.scaled_mm(
        numbers, weight.numbers.t(), _by_groups(scales), recipe, _by_groups(weight.scales), recipe,
        output_dtype=torch.bfloat16,
    )  # fmt: skip
    return out


class ScaledProduct:
    """Takes x in bfloat16."""

    def __init__(self, weight: GroupedWeight, multiply: Multiply = multiply_scaled) -> None:
        self._weight, self._multiply = weight._replace(scales=_by_groups(weight.scales)), multiply

    def __call__(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """x Wᵀ + bias + residual [rows, out], of x [rows, in]."""
        numbers, scales = rounded(F.pad(self._weight.ordered(x), (0, 0, 0, -len(x) % MULTIPLE)))
        out = self._multiply(numbers, scales, self._weight)[: len(x)]
        if bias is not None:
            out = out.add_(bias)
        return out if residual is None else out.add_(residual)


def make_scaled_product(weight: GroupedWeight) -> ScaledProduct | None:
    """None where the product does not take the weight, or the device does not have it."""
    if weight.kind is not NumberKind.FP8 or weight.group_size != CHUNK or weight.out_features % MULTIPLE:
        return None
    return ScaledProduct(weight) if has_scaled_product(weight.numbers.device) else None


@functools.cache
def has_scaled_product(device: torch.device) -> bool:
    """Tried once a device; what is found is logged."""
    reason = _refusal(device)
    if reason is None:
        logger.info("FP8 weights in blocks: many rows by torch's scaled product, activations in FP8 too")
    else:
        logger.info("FP8 weights in blocks: all rows by Triton, activations as they are: %s", reason)
    return reason is None


def _refusal(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the device is {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"compute capability {capability} is below {LEAST_CAPABILITY}"
    if not hasattr(F, "scaled_mm"):
        return "this torch has no scaled_mm"
    try:
        error = try_product(device, multiply_scaled)
    except RuntimeError as failure:  # also NotImplementedError
        return str(failure).splitlines()[0]
    except ValueError as failure:
        return str(failure).splitlines()[0]
    return None if error <= MOST_ERROR else f"its products are wrong by {error:.3f}"


def try_product(device: torch.device, multiply: Multiply) -> float:
    """The relative error of a product, beside the same numbers widened in float32."""
    generator = torch.Generator().manual_seed(0)
    num_rows, num_outputs, groups = 3 * MULTIPLE, 2 * CHUNK + MULTIPLE, torch.arange(3 * CHUNK) // CHUNK
    numbers = torch.randn(num_outputs, len(groups), generator=generator).to(torch.float8_e4m3fn)
    of_weight = torch.rand(num_outputs, 3, generator=generator) + 0.5
    weight = arrange(NumberKind.FP8, numbers, of_weight, None, groups).to(device)
    x, scales = rounded(torch.randn(num_rows, len(groups), generator=generator).to(device))
    wide = x.float() * scales.repeat_interleave(CHUNK, dim=1)
    expected = wide.double() @ weight.widened(slice(None), torch.float32).double().t()
    found = multiply(x, scales, weight).double()
    return float((found - expected).norm() / expected.norm())


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, inputs] as FP8 [rows, padded inputs] times scales [rows, groups of 128] in float32."""
    padded = F.pad(x, (0, -x.shape[1] % CHUNK)).view(len(x), -1, CHUNK).float()
    scales = padded.abs().amax(dim=2, keepdim=True).div_(LARGEST).clamp_(min=SMALLEST_SCALE)
    return (padded / scales).to(torch.float8_e4m3fn).flatten(1), scales.squeeze(2)


def _by_groups(scales: Tensor) -> Tensor:
    """The same [rows, groups], with the rows of a group side by side in memory."""
    return scales.t().contiguous().t()
