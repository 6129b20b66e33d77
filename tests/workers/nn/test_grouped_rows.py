"""Rows times quantised weights, by each kernel: as the dense matrix that the weight stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.workers.nn.test_grouped import GROUPS, random_weight
from workers.nn.native import operators
from workers.nn.native.grouped_rows import TILES, grouped_versions, multiply, widen
from workers.nn.weights import grouped_cpu
from workers.nn.weights.base import Activations
from workers.nn.weights.grouped import GroupedLinear, GroupedWeight, NumberKind, choose_product
from workers.nn.weights.grouped_cpu import CpuProduct

LAYOUTS = GROUPS | {
    "256": torch.arange(1024) // 256,
    "384, the last shorter": torch.arange(1000) // 384,
    "64, the last shorter": torch.arange(1510) // 64,
    "32, of many": torch.arange(1500) // 32,
    "one, long": torch.zeros(2080, dtype=torch.int64),
}
INT4, INT8, FP8 = NumberKind
KINDS = [(INT4, True), (INT4, False), (INT8, True), (INT8, False), (FP8, False)]
EVERY_KIND = pytest.mark.parametrize(("kind", "has_zeros"), KINDS)
LOOSE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of the largest result, by type
LOOSE_HALF = 2e-3


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.skipif(name not in grouped_versions(), reason=f"has no {name}"))
        for name in ("avx2", "vnni", "amx")
    ]
)
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def weight_of(kind: NumberKind, has_zeros: bool, groups: Tensor, out: int) -> GroupedWeight:
    weight, _ = random_weight(kind, has_zeros and kind is INT4, groups, out)
    if has_zeros and kind is INT8:
        zeros = torch.randint(-128, 128, weight.scales.shape, generator=torch.Generator().manual_seed(4))
        weight = weight._replace(zeros=zeros.to(torch.int8))
    return weight


def whole_rows(rows: int, columns: int) -> Tensor:
    """Numbers that quantising to 8 bits leaves as they are."""
    x = torch.randint(-127, 128, (rows, columns), generator=torch.Generator().manual_seed(5)).float()
    x[:, 0] = 127
    return x * 2.0 ** (torch.arange(rows)[:, None] % 5 - 3)


def types_of(kernel: str, is_quantized: bool) -> list[torch.dtype]:
    """Of x, that the kernel multiplies."""
    if kernel != TILES:
        return list(LOOSE)
    return [] if is_quantized else [torch.bfloat16]


def assert_near(found: Tensor, expected: Tensor) -> None:
    error = float((found.double() - expected).abs().max() / expected.abs().max())
    assert error < LOOSE.get(found.dtype, LOOSE_HALF), error


@pytest.mark.parametrize("is_quantized", [False, True])
@EVERY_KIND
@pytest.mark.parametrize("groups", LAYOUTS.values(), ids=LAYOUTS)
def test_products(kernel: str, groups: Tensor, kind: NumberKind, has_zeros: bool, is_quantized: bool) -> None:
    if is_quantized and (kind is FP8 or kernel == TILES):
        pytest.skip("refused")
    out = 71
    weight = weight_of(kind, has_zeros, groups, out)
    dense = weight.widened(slice(None), torch.float32).double()
    rows = whole_rows(70, len(groups)) if is_quantized else torch.randn(70, len(groups))
    for dtype in types_of(kernel, is_quantized):
        all_rows = rows.to(dtype)  # whole numbers of 8 bits have room in bfloat16
        for count in (1, 2, 3, 4, 7, 20, 33, 70):
            x = all_rows[:count]
            bias, residual = 100 * torch.randn(out).to(dtype), 100 * torch.randn(count, out).to(dtype)
            plain = F.linear(weight.ordered(x).double(), dense)
            for given in ((None, None), (bias, None), (bias, residual)):
                found = multiply(kernel, weight, x, *given, is_quantized)
                assert found.dtype is dtype
                assert_near(found, plain + sum(part.double() for part in given if part is not None))


@pytest.mark.parametrize("out", [1, 3, 4, 5, 130])
def test_any_number_of_outputs(kernel: str, out: int) -> None:
    weight = weight_of(INT4, True, GROUPS["128"], out)
    x = whole_rows(3, 384)
    plain = F.linear(x, weight.widened(slice(None), torch.float32)).double()
    for is_quantized in (False, True):
        for dtype in types_of(kernel, is_quantized):
            assert_near(multiply(kernel, weight, x.to(dtype), None, None, is_quantized), plain)


def test_more_rows_than_a_cache_has_room_for(kernel: str) -> None:
    weight, x = weight_of(INT4, True, LAYOUTS["one, long"], 40), torch.randn(333, 2080)
    for dtype in types_of(kernel, False):
        plain = F.linear(x.to(dtype).double(), weight.widened(slice(None), torch.float32).double())
        assert_near(multiply(kernel, weight, x.to(dtype), None, None, False), plain)


@EVERY_KIND
@pytest.mark.parametrize("groups", LAYOUTS.values(), ids=LAYOUTS)
def test_widened_weights_are_those_of_torch(
    kernel: str, groups: Tensor, kind: NumberKind, has_zeros: bool
) -> None:
    weight = weight_of(kind, has_zeros, groups, 21)
    for dtype in LOOSE:
        for part in (slice(0, 21), slice(5, 8)):
            found = torch.empty(part.stop - part.start, weight.num_inputs, dtype=dtype)
            widen(kernel, weight, part, found)
            assert torch.equal(found, weight.widened(part, dtype))


@pytest.mark.parametrize("is_quantized", [False, True])
def test_what_is_no_number_stays_in_its_row(kernel: str, is_quantized: bool) -> None:
    weight = weight_of(INT4, True, GROUPS["128"], 10)
    dtype, *_ = types_of(kernel, is_quantized) or pytest.skip("refused")
    x = whole_rows(5, 384).to(dtype)
    plain = multiply(kernel, weight, x, None, None, is_quantized)
    x[1, 37], x[3] = float("nan"), 0
    found = multiply(kernel, weight, x, None, None, is_quantized)
    assert found[1].isnan().all()
    assert not found[3].any()
    assert torch.equal(found[[0, 2, 4]], plain[[0, 2, 4]])


def test_a_weight_that_is_no_number_makes_an_output_that_is_none(kernel: str) -> None:
    weight = weight_of(FP8, False, GROUPS["128"], 10)
    weight.numbers.view(torch.uint8)[2, 7], weight.numbers.view(torch.uint8)[9, 383] = 0x7F, 0xFF
    x, dense = torch.zeros(2, 384, dtype=types_of(kernel, False)[0]), torch.empty(10, 384)
    found = multiply(kernel, weight, x, None, None, False)
    widen(kernel, weight, slice(0, 10), dense)
    broken = torch.tensor([2, 9])
    for result in (found.t(), dense):
        assert torch.equal(torch.nonzero(result.isnan().any(dim=1)).flatten(), broken)


@pytest.mark.parametrize("is_quantized", [False, True])
def test_rows_that_do_not_lie_side_by_side_and_none(kernel: str, is_quantized: bool) -> None:
    weight = weight_of(INT4, True, GROUPS["64"], 70)
    dtype, *_ = types_of(kernel, is_quantized) or pytest.skip("refused")
    wide, residual = torch.randn(4, 384, dtype=dtype), torch.randn(70, 4, dtype=dtype).t()
    found = multiply(kernel, weight, wide[:, ::2], None, residual, is_quantized)
    expected = multiply(kernel, weight, wide[:, ::2].contiguous(), None, residual.contiguous(), is_quantized)
    assert torch.equal(found, expected)
    assert multiply(kernel, weight, wide[:0, ::2], None, None, is_quantized).shape == (0, 70)


@pytest.mark.skipif(TILES not in grouped_versions(), reason="has no tiles")
def test_tiles_take_bfloat16_only() -> None:
    weight, x = weight_of(INT4, True, GROUPS["128"], 10), torch.randn(20, 384)
    for given, is_quantized in ((x, False), (x.bfloat16(), True)):
        with pytest.raises(ValueError, match="AMX multiplies x in bfloat16"):
            multiply(TILES, weight, given, None, None, is_quantized)


@pytest.mark.skipif(not grouped_versions(), reason="no kernel for this processor")
@EVERY_KIND
@pytest.mark.parametrize("groups", ["shuffled, of several sizes", "128, the last shorter"])
def test_few_rows_and_many(
    groups: str, kind: NumberKind, has_zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_cpu, "TILE_NUMBERS", 5000)
    monkeypatch.setattr(grouped_cpu, "FEW", dict.fromkeys(NumberKind, 16))
    weight = weight_of(kind, has_zeros, LAYOUTS[groups], 70)
    bias, x = torch.randn(70), torch.randn(100, weight.in_features)
    residual = torch.randn(100, 70)
    linear = GroupedLinear(weight, bias)
    expected = weight.ordered(x).double() @ weight.widened(slice(None), torch.float32).double().t() + bias
    for rows in (0, 1, 16, 17, 100):
        if rows:
            assert_near(linear(x[:rows]), expected[:rows])
            assert_near(linear.add_to(residual[:rows], x[:rows]), expected[:rows] + residual[:rows])
        assert linear(x[:rows]).shape == (rows, 70)
    half = linear.add_to(residual[:2].half(), x[:2].half())
    assert half.dtype is torch.float16
    assert_near(half, expected[:2] + residual[:2])


@pytest.mark.skipif(not grouped_versions(), reason="no kernel for this processor")
def test_when_activations_have_8_bits() -> None:
    def are_quantized(kind: NumberKind, activations: Activations) -> list[bool]:
        product = choose_product(weight_of(kind, False, GROUPS["32"], 4), activations)
        assert isinstance(product, CpuProduct)
        return [product.is_quantized(dtype) for dtype in (torch.float32, torch.bfloat16)]

    for kind in (INT4, INT8):
        assert are_quantized(kind, Activations.AUTO) == [False, True]
        assert are_quantized(kind, Activations.INT8) == [True, True]
        assert are_quantized(kind, Activations.NONE) == [False, False]
    assert are_quantized(FP8, Activations.AUTO) == are_quantized(FP8, Activations.NONE) == [False, False]
    with pytest.raises(ValueError, match="FP8 have no kernel"):
        are_quantized(FP8, Activations.INT8)


def test_without_kernels_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "kernels", None)
    weight = weight_of(INT4, True, GROUPS["128"], 10)
    assert choose_product(weight) is None
    with pytest.raises(ValueError, match="need the compiled kernels"):
        choose_product(weight, Activations.INT8)
    with pytest.raises(ValueError, match="no activations in 8 bits on meta"):
        choose_product(weight._replace(numbers=weight.numbers.to("meta")), Activations.INT8)
