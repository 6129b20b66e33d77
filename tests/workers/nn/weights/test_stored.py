"""Layers of quantised checkpoints as their makers write them: products are those of the matrix that the
maker's formula gives, whole, in the parts of ranks, and beside layers of other formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.dequantised import dense_tensors
from tools.random_checkpoint.quantized import RECIPES
from tools.random_checkpoint.quantized.base import Recipe
from workers.llm.parallel import TensorParallel, share_experts
from workers.nn.fused import Kernels, StackedWeight
from workers.nn.layers import silu_mul
from workers.nn.loader import Checkpoint
from workers.nn.weights import stored as stored_module
from workers.nn.weights.base import Linear
from workers.nn.weights.dense import Dense, TorchLinear
from workers.nn.weights.experts import GroupedExperts, ListedExperts
from workers.nn.weights.grouped import GroupedLinear, GroupedWeight
from workers.nn.weights.registry import choose_formats, open_weights
from workers.nn.weights.shard import WHOLE, ExpertsShard, Shard
from workers.nn.weights.side_by_side import SideBySide
from workers.nn.weights.weights import Weights

CPU = torch.device("cpu")
SERVED = [name for name in RECIPES if name not in ("nvfp4", "gguf")]
ATTENTION = "model.layers.0.self_attn"
MLP = "model.layers.0.mlp"


class Stored:
    """A folder with layers in a format, and the matrices that they stand for."""

    def __init__(self, folder: Path, settings: Mapping[str, Any] | None, tensors: dict[str, Tensor]) -> None:
        self.folder, self.tensors = folder, tensors
        config = {} if settings is None else {"quantization_config": settings}
        (folder / "config.json").write_text(json.dumps(config))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "m.safetensors")
        self.settings = settings

    def matrix(self, module: str) -> Tensor:
        assert self.settings is not None
        own = {name: tensor for name, tensor in self.tensors.items() if name.startswith(f"{module}.")}
        return dense_tensors(own, self.settings)[f"{module}.weight"]

    def dense(self) -> dict[str, Tensor]:
        assert self.settings is not None
        return dense_tensors(self.tensors, self.settings)

    def weights(self) -> Weights:
        return open_weights(self.folder, torch.float32, CPU)


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def tensors_of(recipe: Recipe, module: str, weight: Tensor) -> dict[str, Tensor]:
    return {f"{module}.{name}": tensor for name, tensor in recipe.layer(module, weight).items()}


def store(folder: Path, format: str, shapes: Mapping[str, tuple[int, int]], size: int = 32) -> Stored:
    recipe, tensors = RECIPES[format](size), {}
    for seed, (module, shape) in enumerate(shapes.items()):
        tensors |= tensors_of(recipe, module, random_matrix(*shape, seed))
    return Stored(folder, recipe.settings([]), tensors)


def assert_same(linear: Linear, matrix: Tensor, bias: Tensor | None = None) -> None:
    assert (linear.out_features, linear.in_features) == matrix.shape
    x = random_matrix(3, matrix.shape[1], 9)
    expected = x.double() @ matrix.double().t() + (0 if bias is None else bias.double())
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=1e-4)


def name_of(part: str) -> str:
    """With `mixed` and `gptq-mlp` layers of an MLP are in 4 bits."""
    return f"{MLP}.{part}_proj"


@pytest.mark.parametrize("format", SERVED)
def test_a_layer_whole_and_in_parts(format: str, tmp_path: Path) -> None:
    stored = store(
        tmp_path, format, {name_of("gate"): (72, 96), name_of("up"): (40, 96), name_of("down"): (96, 192)}
    )
    weights = stored.weights().under(MLP)
    gate, up, down = (stored.matrix(name_of(part)) for part in ("gate", "up", "down"))
    bias = random_matrix(1, 112)[0]
    linear = weights.column(("gate_proj", "up_proj"), (WHOLE, WHOLE), bias)
    assert isinstance(linear, GroupedLinear)
    assert_same(linear, torch.cat((gate, up)), bias)
    torch.testing.assert_close(weights.matrix("gate_proj", Shard.of_range(5, 43)), gate[5:43])
    # Neither words of 32 bits nor blocks begin where these parts do.
    parts = Shard((slice(3, 20), slice(41, 50)), padding=6), Shard((slice(7, 40),))
    rows = torch.cat((gate[3:20], gate[41:50], torch.zeros(6, 96), up[7:40]))
    assert_same(weights.column(("gate_proj", "up_proj"), parts), rows)
    for num_ranks in (2, 3):  # three have whole groups, two begin within one
        shards = [Shard.split(192, rank, num_ranks) for rank in range(num_ranks)]
        for shard in shards:
            assert_same(weights.row("down_proj", shard), down[:, shard.slices[0]])
    assert_same(
        weights.row("down_proj", Shard((slice(160, 192), slice(8, 24)))),
        down[:, [*range(160, 192), *range(8, 24)]],
    )


@pytest.mark.parametrize(
    "format",
    [
        "fp8-block",
        "compressed-fp8",
        "compressed-fp8-block",
        "compressed-w8a8",
        "compressed-w8a16",
        "modelopt-fp8",
    ],
)
def test_sizes_that_are_no_multiple_of_a_block(format: str, tmp_path: Path) -> None:
    """As 4304 and 3420, the widths of towers' MLPs, are none of 128."""
    stored = store(tmp_path, format, {name_of("down"): (71, 101)})
    assert_same(stored.weights().row(name_of("down"), WHOLE), stored.matrix(name_of("down")))
    shard = Shard.of_range(37, 90)
    assert_same(stored.weights().row(name_of("down"), shard), stored.matrix(name_of("down"))[:, 37:90])


def test_a_last_group_may_be_shorter(tmp_path: Path) -> None:
    stored = store(tmp_path, "gptq", {name_of("down"): (16, 80)})
    assert_same(stored.weights().row(name_of("down"), WHOLE), stored.matrix(name_of("down")))


def test_a_symmetric_weight_has_no_zeros_of_its_own(tmp_path: Path) -> None:
    for format in ("gptq", "gptq-int8", "compressed-int4"):
        stored = store(tmp_path, format, {name_of("down"): (16, 64)})
        linear = stored.weights().row(name_of("down"), WHOLE)
        assert isinstance(linear, GroupedLinear)
        assert linear.weight.zeros is None, format


@pytest.mark.parametrize(
    ("first", "second"), [("gptq", None), ("gptq-desc-act", "gptq"), ("gptq", "gptq-int8")]
)
def test_projections_that_differ_are_kept_apart(first: str, second: str | None, tmp_path: Path) -> None:
    """One of them dense, or with other groups, or other bits."""
    names = [f"{ATTENTION}.{part}_proj" for part in "qkv"]
    kept = random_matrix(16, 64, 5)
    tensors = tensors_of(RECIPES[first](32), names[0], random_matrix(24, 64, 1))
    if second is None:
        tensors[f"{names[1]}.weight"] = kept
    else:
        tensors |= tensors_of(RECIPES[second](32), names[1], kept)
    tensors |= tensors_of(RECIPES[first](32), names[2], random_matrix(8, 64, 2))
    stored = Stored(tmp_path, RECIPES[first](32).settings([]), tensors)
    expected = [stored.matrix(name) for name in (names[0], names[2])]
    if second == "gptq-int8":
        only = {name: tensor for name, tensor in tensors.items() if name.startswith(names[1])}
        kept = dense_tensors(only, RECIPES[second](32).settings([]))[f"{names[1]}.weight"]
    elif second is not None:
        kept = stored.matrix(names[1])
    bias = random_matrix(1, 48)[0]
    linear = stored.weights().column(names, (WHOLE, WHOLE, WHOLE), bias)
    assert isinstance(linear, SideBySide)
    assert_same(linear, torch.cat((expected[0], kept, expected[1])), bias)


EXPERTS = ExpertsShard(4, 64, 48, range(4), Shard.split(48, 0, 1))


def expert_tensors(recipe: Recipe, layout: str) -> dict[str, Tensor]:
    if layout == "one by one":
        shapes = {"gate": (48, 64), "up": (48, 64), "down": (64, 48)}
        tensors: dict[str, Tensor] = {}
        for number in range(4):
            for seed, (part, shape) in enumerate(shapes.items()):
                weight = random_matrix(*shape, 10 * number + seed) / 4
                tensors |= tensors_of(recipe, f"{MLP}.experts.{number}.{part}_proj", weight)
        return tensors
    gate_up, down = (
        torch.stack([random_matrix(*shape, seed) for seed in range(4)]) / 4 for shape in ((96, 64), (64, 48))
    )
    if layout == "transposed":
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    parts = {"gate_up_proj": gate_up, "down_proj": down}
    return {
        f"{MLP}.experts.{name}{part}": tensor
        for name, weight in parts.items()
        for part, tensor in recipe.stacked(weight).items()
    }


def expected_experts(stored: Stored, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    found = stored.dense()
    out = torch.zeros_like(x)
    for token, (experts, of_experts) in enumerate(zip(chosen.tolist(), shares, strict=True)):
        for number, share in zip(experts, of_experts, strict=True):
            if f"{MLP}.experts.gate_up_proj" in found:
                gate_up, down = (found[f"{MLP}.experts.{name}_proj"][number] for name in ("gate_up", "down"))
                gate_up, down = (one.t() if gate_up.shape[0] == 64 else one for one in (gate_up, down))
                gate, up = gate_up.chunk(2)
            else:
                gate, up, down = (
                    found[f"{MLP}.experts.{number}.{name}_proj.weight"] for name in ("gate", "up", "down")
                )
            hidden = torch.nn.functional.silu(gate @ x[token]) * (up @ x[token])
            out[token] += share * (down @ hidden)
    return out


def widened_experts(
    x: Tensor, gate_up: StackedWeight, down: StackedWeight, chosen: Tensor, shares: Tensor, first: int
) -> Tensor:
    """In place of kernels: one token after the other, by matrices that are widened whole."""
    assert isinstance(gate_up, GroupedWeight)
    assert isinstance(down, GroupedWeight)
    of_gate_up = gate_up.dense(x.dtype).view(-1, 2 * down.in_features, gate_up.in_features)
    of_down = down.dense(x.dtype).view(-1, gate_up.in_features, down.in_features)
    out = torch.zeros_like(x)
    for token, (experts, of_experts) in enumerate(zip(chosen.tolist(), shares, strict=True)):
        for number, share in zip(experts, of_experts, strict=True):
            if 0 <= (place := number - first) < len(of_down):
                out[token] += share * (of_down[place] @ silu_mul(of_gate_up[place] @ x[token]))
    return out


def unused(*_: object) -> Any:
    raise AssertionError("experts take one kernel only")


KERNELS = Kernels(unused, unused, unused, widened_experts)
STACKED = [("fp8-block-stacked", layout) for layout in ("stacked", "transposed")]
ONE_BY_ONE = [(format, "one by one") for format in SERVED]


@pytest.mark.parametrize(("format", "layout"), [*ONE_BY_ONE, *STACKED])
def test_experts_of_all_ranks_add_up(format: str, layout: str, tmp_path: Path) -> None:
    recipe = RECIPES[format](16)
    stored = Stored(tmp_path, recipe.settings([]), expert_tensors(recipe, layout))
    x, chosen, shares = random_matrix(3, 64), torch.tensor([[0, 3], [2, 1], [3, 2]]), torch.rand(3, 2)
    expected = expected_experts(stored, x, chosen, shares)
    for num_ranks, has_whole in ((1, False), (2, False), (2, True)):
        total = torch.zeros_like(x)
        for rank in range(num_ranks):
            shard = share_experts(4, 64, 48, TensorParallel(rank, num_ranks, has_whole_experts=has_whole))
            total += stored.weights().under(MLP).experts("experts", shard, None)(x, chosen, shares)
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
    for_kernels = stored.weights().under(MLP).experts("experts", EXPERTS, KERNELS)
    assert isinstance(for_kernels, GroupedExperts)
    torch.testing.assert_close(for_kernels(x, chosen, shares), expected, rtol=1e-4, atol=1e-4)


def test_experts_of_which_one_is_dense(tmp_path: Path) -> None:
    recipe = RECIPES["gptq"](16)
    tensors = expert_tensors(recipe, "one by one")
    dense = f"{MLP}.experts.1.up_proj"
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{dense}.{name}"]
    tensors[f"{dense}.weight"] = random_matrix(48, 64) / 4
    stored = Stored(tmp_path, recipe.settings([]), tensors)
    x, chosen, shares = random_matrix(3, 64), torch.tensor([[0, 1], [2, 1], [1, 2]]), torch.rand(3, 2)
    made = stored.weights().under(MLP).experts("experts", EXPERTS, KERNELS)
    assert isinstance(made, ListedExperts)
    torch.testing.assert_close(
        made(x, chosen, shares), expected_experts(stored, x, chosen, shares), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("format", SERVED)
def test_engines_get_dense_layers(format: str, tmp_path: Path) -> None:
    """An export to ONNX traces torch's own operators only."""
    stored = store(tmp_path, format, {name_of("gate"): (32, 64), name_of("up"): (32, 64)})
    formats = choose_formats(tmp_path, CPU, dense=Dense(TorchLinear))
    weights = Weights(Checkpoint(tmp_path, torch.float32, CPU), formats).under(MLP)
    linear = weights.column(("gate_proj", "up_proj"), (WHOLE, WHOLE))
    assert type(linear) is TorchLinear
    assert_same(linear, torch.cat([stored.matrix(name_of(part)) for part in ("gate", "up")]))
    assert type(weights.packed("gate_proj", torch.zeros(2, 2))) is TorchLinear


@pytest.mark.parametrize("format", SERVED)
def test_a_large_layer_is_read_part_by_part(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never all of an output layer's numbers one by one."""
    monkeypatch.setattr(stored_module, "PART_NUMBERS", 16 * 64)
    read: list[int] = []

    class Watched(Checkpoint):
        def read(self, *arguments: Any, **options: Any) -> Tensor:
            part = super().read(*arguments, **options)
            read.append(part.nbytes)
            return part

    stored = store(tmp_path, format, {name_of("up"): (200, 64)})
    formats = choose_formats(tmp_path, CPU)
    linear = Weights(Watched(tmp_path, torch.float32, CPU), formats).column((name_of("up"),), (WHOLE,))
    assert_same(linear, stored.matrix(name_of("up")))
    assert max(read) <= max(16 * 64, 200 * 2 * 4), "16 outputs, or all outputs' scales of two groups"
