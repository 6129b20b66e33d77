"""FP8 by torch's scaled product: what it is handed, and what becomes of a device that has none."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from torch import Tensor

from workers.nn.grouped_kernels import FEW_ROWS
from workers.nn.weights import scaled
from workers.nn.weights.grouped import GroupedWeight, NumberKind, arrange
from workers.nn.weights.grouped_cuda import make_cuda_product
from workers.nn.weights.scaled import (
    MOST_ERROR,
    ScaledProduct,
    has_scaled_product,
    make_scaled_product,
    multiply_scaled,
    rounded,
    try_product,
)

CPU, META = torch.device("cpu"), torch.device("meta")


def random_weight(num_outputs: int, num_inputs: int, group: int = 128) -> GroupedWeight:
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(num_inputs) // group
    numbers = torch.randn(num_outputs, num_inputs, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(num_outputs, int(groups.max()) + 1, generator=generator) + 0.5
    return arrange(NumberKind.FP8, numbers, scales, None, groups)


def by_widening(numbers: Tensor, scales: Tensor, weight: GroupedWeight) -> Tensor:
    """What the product computes."""
    assert (len(numbers) % 16, numbers.shape[1] % 128) == (0, 0)
    wide = numbers.float() * scales.repeat_interleave(128, dim=1)
    return (
        wide @ weight._replace(num_inputs=wide.shape[1]).widened(slice(None), torch.float32).t()
    ).bfloat16()


@pytest.mark.parametrize("num_inputs", [256, 200])
def test_rows_and_inputs_are_padded(num_inputs: int) -> None:
    weight = random_weight(48, num_inputs)
    x, bias, residual = (torch.randn(shape).bfloat16() for shape in ((5, num_inputs), (48,), (5, 48)))
    expected = x.double() @ weight.widened(slice(None), torch.float32).double().t() + bias + residual
    found = ScaledProduct(weight, by_widening)(x, bias, residual).double()
    assert 0.003 < float((found - expected).norm() / expected.norm()) < 0.05, "activations in 8 bits"


@pytest.mark.parametrize("num_inputs", [128, 384])
def test_torch_takes_what_it_is_handed(num_inputs: int) -> None:
    """By its own checks of a call on a GPU, which need none."""
    x = torch.empty(70, num_inputs, dtype=torch.bfloat16, device=META)
    found = ScaledProduct(random_weight(48, num_inputs).to(META), multiply_scaled)(x, None, None)
    assert (found.shape, found.dtype) == ((70, 48), torch.bfloat16)


def test_a_row_of_zeros_stays_one() -> None:
    numbers, scales = rounded(torch.zeros(2, 130, dtype=torch.bfloat16))
    assert (numbers.shape, scales.shape) == ((2, 256), (2, 2))
    assert bool((numbers.float() == 0).all())
    assert bool(scales.isfinite().all())


def test_a_wrong_product_is_found() -> None:
    assert try_product(CPU, by_widening) < MOST_ERROR

    def without_scales(numbers: Tensor, scales: Tensor, weight: GroupedWeight) -> Tensor:
        return by_widening(numbers, torch.ones_like(scales), weight)

    assert try_product(CPU, without_scales) > MOST_ERROR


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], found: float | Exception) -> None:
    def try_it(device: torch.device, multiply: object) -> float:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(scaled, "try_product", try_it)
    has_scaled_product.cache_clear()


@pytest.mark.parametrize(
    ("capability", "found", "words"),
    [
        ((9, 0), 0.003, "many rows by torch's scaled product, activations in FP8 too"),
        ((9, 0), 0.2, "all rows by Triton, activations as they are: its products are wrong by 0.200"),
        ((8, 9), 0.0, r"by Triton, .* compute capability \(8, 9\) is below \(9, 0\)"),
        ((10, 0), NotImplementedError("only for SM90"), "by Triton, .* only for SM90"),
        ((9, 0), ValueError("no such recipe"), "by Triton, .* no such recipe"),
    ],
)
def test_the_choice_is_told_once(
    capability: tuple[int, int],
    found: float | Exception,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    on_a_gpu(monkeypatch, capability, found)
    device = torch.device("cuda", 0)
    assert has_scaled_product(device) is has_scaled_product(device) is ("by torch's" in words)
    assert len(caplog.records) == 1
    assert caplog.records[0].levelname == "INFO"
    assert re.search(words, caplog.text)
    has_scaled_product.cache_clear()


@pytest.mark.interpreter
def test_few_rows_and_other_types_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor any, where activations may not be."""
    monkeypatch.setattr(scaled, "has_scaled_product", lambda device: True)
    monkeypatch.setattr(ScaledProduct, "__call__", lambda *arguments: "scaled")
    weight, wide = random_weight(16, 128), torch.randn(FEW_ROWS + 1, 128)
    product, exact = make_cuda_product(weight), make_cuda_product(weight, may_round=False)
    assert product(wide.bfloat16(), None, None) == "scaled"
    assert exact(wide.bfloat16(), None, None).shape == (FEW_ROWS + 1, 16)
    assert product(wide, None, None).dtype == torch.float32
    assert product(wide[:FEW_ROWS].bfloat16(), None, None).shape == (FEW_ROWS, 16)


def test_which_weights_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled, "has_scaled_product", lambda device: True)
    assert make_scaled_product(random_weight(48, 256)) is not None
    assert make_scaled_product(random_weight(40, 256)) is None, "torch takes multiples of 16 outputs"
    assert make_scaled_product(random_weight(48, 256, group=64)) is None
    assert make_scaled_product(random_weight(48, 256)._replace(kind=NumberKind.INT8)) is None
