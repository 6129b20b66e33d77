from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from workers.nn.loader import Checkpoint
from workers.nn.native import half_rows
from workers.nn.weights.dense import (
    Dense,
    HalfLinear,
    OneDnnLinear,
    SixteenBitLinear,
    TorchLinear,
    is_half_exact,
    make_linear,
)
from workers.nn.weights.processor import can_pack, has_fbgemm, is_x86
from workers.nn.weights.shard import WHOLE, Shard

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_layer_is_what_torch_computes(rows: int, has_bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(70, 48).to(dtype), torch.randn(70).to(dtype) if has_bias else None
    x, residual = torch.randn(rows, 48).to(dtype), torch.randn(rows, 70).to(dtype)
    linear = make_linear(weight, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.02}
    torch.testing.assert_close(linear(x).double(), expected, **tolerance)
    torch.testing.assert_close(linear.add_to(residual, x).double(), expected + residual.double(), **tolerance)
    assert (linear.in_features, linear.out_features) == (48, 70)


@pytest.mark.skipif(not is_x86(), reason="FBGEMM is for x86")
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 6, 7, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_weights_of_16_bits_stay_in_16_bits_and_the_arithmetic_in_32(
    rows: int,
    has_bias: bool,
    source: torch.dtype,
) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(130, 600).to(source).float(), torch.randn(130) if has_bias else None
    x, residual = torch.randn(rows, 600), torch.randn(rows, 130)
    linear = make_linear(weight, bias)
    assert type(linear) is HalfLinear
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(linear(x).double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        linear.add_to(residual, x).double(),
        expected + residual.double(),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.skipif(not half_rows.has_kernel(), reason="no kernel for this processor")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 3), (5, 8), (70, 1600), (13, 3101)])
def test_a_weight_of_16_bits_as_its_file_has_it(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    """For all rows at once and one by one; inputs that are no multiple of a vector, and more than are taken
    at a time."""
    torch.manual_seed(0)
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs)
    linear, plain = SixteenBitLinear(weight, bias), SixteenBitLinear(weight)
    for rows in (0, 1, 2, 3, 4, 9):
        x, residual = torch.randn(rows, inputs), torch.randn(rows, outputs)
        product = x.double() @ weight.double().t()
        for found, expected in (
            (linear(x), product + bias),
            (plain(x), product),
            (linear.add_to(residual, x), product + bias + residual),
            (plain.add_to(residual, x), product + residual),
        ):
            torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(linear(torch.ones(2, 3, inputs)), linear(torch.ones(6, inputs)).view(2, 3, outputs))
    assert plain(torch.full((1, inputs), float("nan"))).isnan().all()


def dense_folder(folder: Path, *types: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.weight": torch.randn(12, 24, generator=generator).to(dtype)
        for name, dtype in zip("ab", types, strict=True)
    }
    save_file(tensors, folder / "model.safetensors")
    return {name: tensor.float() for name, tensor in tensors.items()}


@pytest.mark.skipif(not half_rows.has_kernel(), reason="no kernel for this processor")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_of_a_file_stay_in_its_type(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = dense_folder(tmp_path, dtype, dtype)
    checkpoint, format = Checkpoint(tmp_path, torch.float32, torch.device("cpu")), Dense()
    a, b = tensors["a.weight"], tensors["b.weight"]
    x, bias = torch.randn(3, 24), torch.randn(10)
    parts = Shard((slice(1, 3), slice(5, 8)), padding=2), Shard.of_range(9, 12)
    for found, expected in (
        (format.column(checkpoint, ["a", "b"], parts, bias),
         F.linear(x, torch.cat((a[1:3], a[5:8], torch.zeros(2, 24), b[9:])), bias)),
        (format.column(checkpoint, ["b"], [WHOLE], None), x @ b.t()),
        (format.tied(checkpoint, "a.weight", Shard.of_range(4, 12, 3)), F.pad(x @ a[4:].t(), (0, 3))),
    ):  # fmt: skip
        assert isinstance(found, SixteenBitLinear)
        assert found.weight.dtype is dtype
        torch.testing.assert_close(found(x), expected, atol=1e-4, rtol=1e-4)
    columns = Shard((slice(16, 24), slice(3, 5)), padding=1)
    row = format.row(checkpoint, "a", columns)
    assert isinstance(row, SixteenBitLinear)
    inputs = [*range(16, 24), 3, 4]
    torch.testing.assert_close(row(x[:, :11]), x[:, :10] @ a[:, inputs].t(), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"axis 1 of 'a.weight' are 24 .* by its config.json 48"):
        format.row(checkpoint, "a", Shard.split(48, 0, 2))


def test_layers_that_are_packed_nevertheless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of two types, of an export, in bfloat16; and all without the kernel."""
    dense_folder(tmp_path, torch.float16, torch.bfloat16)
    wide, narrow = (
        Checkpoint(tmp_path, dtype, torch.device("cpu")) for dtype in (torch.float32, torch.bfloat16)
    )
    shards = [WHOLE, WHOLE]
    assert not isinstance(Dense().column(wide, ["a", "b"], shards, None), SixteenBitLinear)
    assert type(Dense(TorchLinear).column(wide, ["a"], [WHOLE], None)) is TorchLinear
    assert not isinstance(Dense().row(narrow, "a", WHOLE), SixteenBitLinear)
    monkeypatch.setattr(half_rows, "has_kernel", lambda: False)
    assert not isinstance(Dense().tied(wide, "a.weight", WHOLE), SixteenBitLinear)


def test_which_kind_a_weight_gets() -> None:
    torch.manual_seed(0)
    # The x86 wheels of torch have it: without it decode is half as fast on most laptops.
    assert has_fbgemm() == is_x86()
    exact = torch.randn(5000, 8).half().float()
    assert type(make_linear(exact)) is (HalfLinear if is_x86() else OneDnnLinear)
    assert type(make_linear(torch.randn(5000, 8))) is OneDnnLinear, "float16 would round it"
    assert type(make_linear(exact.double())) is TorchLinear
    assert type(make_linear(exact.to("meta"))) is TorchLinear
    assert not can_pack(torch.float64)


def test_float16_holds_weights_of_bfloat16_checkpoints_but_no_others() -> None:
    assert is_half_exact(
        (0.02 * torch.randn(5000, 16, generator=torch.Generator().manual_seed(0))).bfloat16().float(),
    )
    for value, is_exact in (
        (65504.0, True),
        (65536.0, False),
        (1e-6, True),
        (1.0 + 2**-12, False),
        (float("nan"), False),
        (float("inf"), False),
    ):
        weight = torch.zeros(5000, 2)
        weight[0, 0], weight[4999, 1] = 0.5, value
        assert is_half_exact(weight) == is_exact, value
    assert is_half_exact(torch.zeros(3, 3))
    tiny = 1e-6 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert not is_half_exact(tiny), "all are so small that float16 would ruin them"
