"""Adapters beside a layer, against x Wᵀ + scale · x Aᵀ Bᵀ row by row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.adapters import read_adapter
from workers.nn.loader import Checkpoint
from workers.nn.weights import adapters as adapters_module
from workers.nn.weights.adapters import (
    FEW_COLUMNS,
    FEW_ROWS,
    AdaptedLinear,
    AdapterSet,
    GroupedRows,
    MaskedRows,
)
from workers.nn.weights.base import Format
from workers.nn.weights.dense import Dense
from workers.nn.weights.int8 import Int8
from workers.nn.weights.shard import WHOLE, Shard
from workers.nn.weights.weights import Weights

CPU = torch.device("cpu")
SIZES = {"q_proj": (12, 10), "k_proj": (6, 10), "v_proj": (6, 10), "o_proj": (10, 12), "alone": (4, 10)}
# By adapter: its layers, rank, alpha.
ADAPTERS: Mapping[str, tuple[Sequence[str], int, int]] = {
    "all": (("q_proj", "k_proj", "v_proj", "o_proj"), 3, 6),
    "values": (("v_proj",), 2, 5),
    "queries and outputs": (("q_proj", "o_proj"), 4, 1),
}
QKV = ("q_proj", "k_proj", "v_proj")
HEADS = Shard.of_range(0, 12), Shard.of_range(0, 6), Shard.of_range(0, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("adapted")
    torch.manual_seed(0)
    weights = {f"layer.{name}.weight": torch.randn(shape) for name, shape in SIZES.items()}
    save_file(weights, made / "model.safetensors")
    for name, (layers, rank, alpha) in ADAPTERS.items():
        tensors = {}
        for layer in layers:
            out, width = SIZES[layer]
            tensors[f"base_model.model.layer.{layer}.lora_A.weight"] = torch.randn(rank, width)
            tensors[f"base_model.model.layer.{layer}.lora_B.weight"] = torch.randn(out, rank)
        write(made / name, tensors, r=rank, lora_alpha=alpha)
    return made


def write(place: Path, tensors: Mapping[str, Tensor], **settings: Any) -> None:
    place.mkdir()
    usual = {"peft_type": "LORA", "target_modules": "all-linear"}
    (place / "adapter_config.json").write_text(json.dumps({**usual, **settings}))
    save_file(dict(tensors), place / "adapter_model.safetensors")


def opened(folder: Path, format: Format | None = None) -> tuple[Weights, AdapterSet]:
    adapters = [read_adapter(name, folder / name) for name in ADAPTERS]
    made = AdapterSet(adapters, lambda module: True, torch.float32, CPU)
    formats = (format or Dense(), Dense())
    return Weights(Checkpoint(folder, torch.float32, CPU), formats, adapters=made).under("layer"), made


def expected(folder: Path, layer: str, x: Tensor, numbers: Sequence[int]) -> Tensor:
    """What the adapters add to each row."""
    added = torch.zeros(len(x), SIZES[layer][0], dtype=torch.float64)
    for row, number in enumerate(numbers):
        name = [*ADAPTERS][number] if number >= 0 else ""
        if name and layer in ADAPTERS[name][0]:
            _, rank, alpha = ADAPTERS[name]
            tensors = load_file(folder / name / "adapter_model.safetensors")
            a, b = (tensors[f"base_model.model.layer.{layer}.lora_{kind}.weight"].double() for kind in "AB")
            added[row] = alpha / rank * (b @ (a @ x[row].double()))
    return added


MIXES = {
    "few rows of all": [1, -1, 0, 2, 2, -1, 0],
    "one adapter": [0, 0, 0],
    "one adapter between others": [-1, 1, -1, 1],
    "many rows": [-1] * 5 + [2] * FEW_ROWS + [0, 1, 0, 1] + [-1] * 3,
}


@pytest.mark.parametrize("format", [Dense(), Int8()], ids=["dense", "int8"])
@pytest.mark.parametrize("numbers", MIXES.values(), ids=MIXES)
def test_each_row_has_its_own_adapter(numbers: list[int], format: Format, folder: Path) -> None:
    weights, adapters = opened(folder, format)
    qkv, out = weights.column(QKV, HEADS), weights.row("o_proj", WHOLE)
    adapters_of = np.array(numbers)
    x = torch.randn(len(numbers), 10)
    before = qkv(x)
    with adapters.of_rows(adapters_of):
        found = qkv(x)
        y, residual = found[:, :12], torch.randn(len(numbers), 10)
        projected, added = out(y), out.add_to(residual, y)
    wanted = torch.cat([expected(folder, layer, x, numbers) for layer in QKV], dim=1)
    torch.testing.assert_close((found - before).double(), wanted, atol=1e-4, rtol=1e-4)
    of_out = expected(folder, "o_proj", y, numbers)
    torch.testing.assert_close((projected - out(y)).double(), of_out, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(added, residual + projected, atol=1e-3, rtol=1e-4)
    assert torch.equal(qkv(x), before), "the step is over"
    without = [row for row, number in enumerate(numbers) if number < 0]
    assert torch.equal(found[without], before[without]), "these rows have none"


@pytest.mark.parametrize(("few_columns", "num_products"), [(FEW_COLUMNS, 1), (8, 3)])
def test_both_ways_to_compute_are_one(
    few_columns: int, num_products: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters_module, "FEW_COLUMNS", few_columns)
    weights, _ = opened(folder)
    qkv = weights.column(QKV, HEADS)
    assert isinstance(qkv, AdaptedLinear)
    assert len(qkv._low_rank.products) == num_products
    x, numbers = torch.randn(7, 10), torch.tensor(MIXES["few rows of all"])
    masked, grouped = torch.zeros(7, 24), torch.zeros(7, 24)
    MaskedRows(numbers).add(masked, x, qkv._low_rank)
    rows = [(number, (numbers == number).nonzero()[:, 0]) for number in range(3)]
    GroupedRows(rows).add(grouped, x, qkv._low_rank)
    torch.testing.assert_close(masked, grouped)
    assert masked.any()


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_add_up(size: int, folder: Path) -> None:
    numbers = np.array(MIXES["few rows of all"])
    x, y = torch.randn(7, 10), torch.randn(7, 12)
    whole, all_adapters = opened(folder)
    qkv, out = whole.column(QKV, HEADS), whole.row("o_proj", WHOLE)
    with all_adapters.of_rows(numbers):
        wanted, wanted_out = qkv(x), out(y)
    columns, parts = [], []
    for rank in range(size):
        weights, adapters = opened(folder)
        # Ranges that are not side by side, as of queries and their gates.
        width = 6 // size
        queries = Shard(
            (slice(rank * width, (rank + 1) * width), slice(6 + rank * width, 6 + (rank + 1) * width))
        )
        shards = queries, Shard.split(6, rank, size), Shard.split(6, rank, size)
        mine = weights.column(QKV, shards)
        part = weights.row("o_proj", Shard.split(12, rank, size))
        with adapters.of_rows(numbers):
            columns.append((queries, mine(x)))
            parts.append(part(y[:, rank * 12 // size : (rank + 1) * 12 // size]))
    torch.testing.assert_close(sum(parts[1:], parts[0]), wanted_out, atol=1e-4, rtol=1e-4)
    for rank, (queries, found) in enumerate(columns):
        per_kv = 6 // size
        kv = [wanted[:, start + rank * per_kv : start + (rank + 1) * per_kv] for start in (12, 18)]
        mine = torch.cat([*(wanted[:, part] for part in queries.slices), *kv], dim=1)
        torch.testing.assert_close(found, mine, atol=1e-4, rtol=1e-4)


def test_a_layer_without_any_is_the_bare_one(folder: Path) -> None:
    weights, adapters = opened(folder)
    assert not isinstance(weights.column(("alone",), (WHOLE,)), AdaptedLinear)
    weights.column(QKV, HEADS)
    with pytest.raises(
        ValueError, match=r"adapter 'all' has the tensor .*o_proj.lora_A.weight, and adapters of"
    ):
        adapters.check_all_loaded()
    weights.row("o_proj", WHOLE)
    adapters.check_all_loaded()


def test_sizes_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    tensors = {"lora_A": torch.ones(2, 9), "lora_B": torch.ones(4, 2)}
    named = {f"base_model.model.layer.alone.{name}.weight": tensor for name, tensor in tensors.items()}
    write(tmp_path / "wide", named, r=2, lora_alpha=2)
    adapters = AdapterSet([read_adapter("wide", tmp_path / "wide")], lambda module: True, torch.float32, CPU)
    weights = Weights(Checkpoint(folder, torch.float32, CPU), (Dense(),), adapters=adapters)
    with pytest.raises(
        ValueError, match=r"'wide' has 4 outputs of 9 inputs for layer.alone, the model 4 of 10"
    ):
        weights.column(("layer.alone",), (WHOLE,))


def test_values_that_would_spoil_other_rows_are_refused(folder: Path, tmp_path: Path) -> None:
    tensors = {"lora_A": torch.ones(2, 10), "lora_B": torch.full((4, 2), torch.inf)}
    named = {f"base_model.model.layer.alone.{name}.weight": tensor for name, tensor in tensors.items()}
    write(tmp_path / "bad", named, r=2, lora_alpha=2)
    adapters = AdapterSet([read_adapter("bad", tmp_path / "bad")], lambda module: True, torch.float32, CPU)
    with pytest.raises(ValueError, match=r"'bad': the tensor .*alone.lora_B.weight has values that are not"):
        adapters.column(Dense().pack(torch.ones(4, 10), None), ("layer.alone",), (WHOLE,))
