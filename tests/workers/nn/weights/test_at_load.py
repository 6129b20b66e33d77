"""Dense weights that are quantised at load: the nearest numbers, in the layout of all devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from workers.llm.parallel import TensorParallel, share_experts
from workers.nn.native.grouped_rows import grouped_versions
from workers.nn.weights.at_load import GroupedAtLoad, quantized
from workers.nn.weights.base import Activations
from workers.nn.weights.experts import ListedExperts
from workers.nn.weights.grouped import GroupedLinear, NumberKind
from workers.nn.weights.registry import open_weights
from workers.nn.weights.shard import WHOLE, Shard

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", NumberKind)
@pytest.mark.parametrize("in_features", [72, 128, 300])
def test_each_weight_is_the_nearest_number(kind: NumberKind, in_features: int) -> None:
    weight = torch.randn(40, in_features, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight[4] += 5  # all of one sign: zero stays a number
    made = quantized(weight, kind)
    wide = made.dense(torch.float32)
    assert not wide[3].any()
    assert made.group_size == (-(-in_features // 128) * 128 if kind is NumberKind.FP8 else 128)
    if kind is NumberKind.FP8:
        # Of 3 digits behind the leading one; numbers near 0 have fewer.
        steps = weight.abs() / 16 + weight.abs().amax(1, keepdim=True) / 448 / 512
    else:
        of_input = torch.arange(in_features) // 128
        steps = made.scales[:, of_input] / 2
    assert bool(((wide - weight).abs() <= 1.01 * steps + 1e-7).all())


@pytest.mark.parametrize(("name", "bound"), [("fp8", 0.04), ("int8", 0.01)])
def test_parts_of_ranks_and_experts(name: str, bound: float, tmp_path: Path) -> None:
    """fp8 has no kernels of a CPU's own; int8 there has, of another layout."""
    tensors = {"up.weight": torch.randn(64, 96)}
    for number in range(2):
        for part, shape in (("gate", (32, 96)), ("up", (32, 96)), ("down", (96, 32))):
            tensors[f"experts.{number}.{part}_proj.weight"] = torch.randn(shape)
    save_file(tensors, tmp_path / "m.safetensors")
    weights, x = open_weights(tmp_path, torch.float32, CPU, name), torch.randn(5, 96)
    parts = [weights.column(("up",), (Shard.split(64, rank, 2),)) for rank in range(2)]
    assert name != "fp8" or isinstance(parts[0], GroupedLinear)
    expected = x @ tensors["up.weight"].t()
    found = torch.cat([part(x) for part in parts], dim=1)
    assert float((found - expected).norm() / expected.norm()) < bound
    assert weights.column(("up",), (WHOLE,)).out_features == 64
    experts = weights.experts("experts", share_experts(2, 96, 32, TensorParallel()), None)
    assert isinstance(experts, ListedExperts)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_activations_are_those_that_the_option_says(name: str, tmp_path: Path) -> None:
    """On a CPU both formats have layouts of its own, for activations in 8 bits; exact ones take another."""
    save_file({"up.weight": torch.randn(64, 128)}, tmp_path / "m.safetensors")
    x = torch.randn(3, 128)
    found = {}
    for activations in ("auto", "int8", "none"):
        weights = open_weights(tmp_path, torch.float32, CPU, name, activations=activations)
        linear = weights.column(("up",), (WHOLE,))
        assert isinstance(linear, GroupedLinear) == (activations == "none")
        found[activations] = linear(x)
        if isinstance(linear, GroupedLinear):
            exact = x @ linear.weight.dense(torch.float32).t()
            torch.testing.assert_close(found["none"], exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(found["auto"], found["int8"])


def test_a_layout_of_all_devices_follows_the_option(tmp_path: Path) -> None:
    weight, x = torch.randn(64, 128), torch.randn(3, 128)
    exact, rounded = GroupedAtLoad(NumberKind.INT8), GroupedAtLoad(NumberKind.INT8)
    if grouped_versions():
        rounded.choose_activations(Activations.INT8)
    of_both = [format.pack(weight, None)(x) for format in (exact, rounded)]
    assert torch.equal(*of_both) != bool(grouped_versions())
    torch.testing.assert_close(*of_both, rtol=0, atol=0.5)
    with pytest.raises(
        ValueError, match="'int8' is for weights that are whole numbers, not for those in FP8"
    ):
        GroupedAtLoad(NumberKind.FP8).choose_activations(Activations.INT8)
