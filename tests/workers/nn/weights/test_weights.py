"""What a model gets of a checkpoint, in dense weights and in a toy format that stores packed ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from workers.nn.fused import Kernels
from workers.nn.loader import Checkpoint
from workers.nn.weights.at_load import GroupedAtLoad
from workers.nn.weights.base import Activations, Experts, Format, Linear
from workers.nn.weights.dense import Dense, TorchLinear
from workers.nn.weights.experts import list_experts
from workers.nn.weights.registry import choose_formats, open_weights
from workers.nn.weights.shard import WHOLE, ExpertsShard, Shard
from workers.nn.weights.side_by_side import SideBySide
from workers.nn.weights.weights import Weights

CPU = torch.device("cpu")
GROUP = 4  # inputs that share a scale
OUT, IN = 6, 16


class ToyLinear(Linear):
    def __init__(self, packed: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__(*packed.shape)
        self._packed, self._scales, self._bias = packed, scales, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._packed * self._scales.repeat_interleave(GROUP, dim=1), self._bias)


class Toy(Format):
    """`packed` int8 [out, in] and `scales` float32 [out, in / GROUP]."""

    name: ClassVar[str] = "toy"

    def __init__(self, ignored: Sequence[str]) -> None:
        self._ignored = ignored

    @classmethod
    def read(cls, config: Mapping[str, object]) -> Toy:
        ignored = config["ignored"]
        assert isinstance(ignored, list)
        return cls(ignored)

    def check_device(self, device: torch.device) -> None:
        if device.type != "cpu":
            raise ValueError("toys are for the CPU")

    def holds(self, checkpoint: Checkpoint, module: str) -> bool:
        return module not in self._ignored

    def column(
        self,
        checkpoint: Checkpoint,
        modules: Sequence[str],
        shards: Sequence[Shard],
        bias: Tensor | None,
    ) -> Linear:
        pairs = zip(modules, shards, strict=True)
        parts = [(module, part) for module, shard in pairs for part in shard.slices]
        packed = torch.cat([checkpoint.read(f"{module}.packed", part) for module, part in parts])
        scales = torch.cat([checkpoint.read(f"{module}.scales", part) for module, part in parts])
        return ToyLinear(packed, scales, bias)

    def row(self, checkpoint: Checkpoint, module: str, shard: Shard) -> Linear:
        (part,) = shard.slices
        of_scales = slice(part.start // GROUP, part.stop // GROUP)
        packed = checkpoint.read(f"{module}.packed", columns=part)
        return ToyLinear(packed, checkpoint.read(f"{module}.scales", columns=of_scales), None)

    def experts(
        self, checkpoint: Checkpoint, module: str, shard: ExpertsShard, kernels: Kernels | None
    ) -> Experts:
        return list_experts(self, checkpoint, module, shard)

    def dense(self, checkpoint: Checkpoint, module: str, shard: Shard) -> Tensor:
        (rows,) = shard.slices
        scales = checkpoint.read(f"{module}.scales", rows).repeat_interleave(GROUP, dim=1)
        return checkpoint.read(f"{module}.packed", rows) * scales

    def tied(self, checkpoint: Checkpoint, name: str, shard: Shard) -> Linear:
        return self.pack(checkpoint.load(name, *shard.slices), None)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return TorchLinear(weight, bias)


class Stored:
    """A folder with the same layers in dense weights under `dense`, and packed under `packed`."""

    def __init__(self, folder: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        self.folder, self.dense = folder, {}
        tensors: dict[str, Tensor] = {}
        for name in ("q", "k", "o"):
            packed = torch.randint(-100, 100, (OUT, IN), dtype=torch.int8, generator=generator)
            scales = 0.01 * torch.rand(OUT, IN // GROUP, generator=generator)
            self.dense[name] = packed * scales.repeat_interleave(GROUP, dim=1)
            tensors[f"dense.{name}.weight"] = self.dense[name]
            tensors[f"packed.{name}.packed"], tensors[f"packed.{name}.scales"] = packed, scales
            for kind in ("dense", "packed"):
                tensors[f"{kind}.{name}.bias"] = torch.rand(OUT, generator=generator)
        tensors["packed.head.weight"] = torch.rand(5, IN, generator=generator)
        save_file(tensors, folder / "model.safetensors")
        self.tensors = tensors

    def weights(self, kind: str) -> Weights:
        formats: list[Format] = [Dense()] if kind == "dense" else [Toy(["packed.head"]), Dense()]
        return Weights(Checkpoint(self.folder, torch.float32, CPU), formats).under(kind)


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return Stored(tmp_path)


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_columns_of_all_ranks_make_the_layer(kind: str, num_ranks: int, stored: Stored) -> None:
    weights, x = stored.weights(kind), torch.rand(3, IN)
    parts = []
    for rank in range(num_ranks):
        shard = Shard.split(OUT, rank, num_ranks)
        bias = weights.bias(("q", "k"), (shard, WHOLE))
        linear = weights.column(("q", "k"), (shard, WHOLE), bias)
        assert (linear.in_features, linear.out_features) == (IN, OUT // num_ranks + OUT)
        q, k = linear(x).split((OUT // num_ranks, OUT), dim=1)
        parts.append(q)
        torch.testing.assert_close(k, F.linear(x, stored.dense["k"], stored.tensors[f"{kind}.k.bias"]))
    expected = F.linear(x, stored.dense["q"], stored.tensors[f"{kind}.q.bias"])
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)


@pytest.mark.parametrize("kind", ["dense", "packed"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_rows_of_all_ranks_add_up(kind: str, num_ranks: int, stored: Stored) -> None:
    weights, x = stored.weights(kind), torch.rand(3, IN)
    total = torch.zeros(3, OUT)
    for rank in range(num_ranks):
        shard = Shard.split(IN, rank, num_ranks)
        total += weights.row("o", shard)(x[:, shard.slices[0]])
    torch.testing.assert_close(total, F.linear(x, stored.dense["o"]))


def test_ranges_and_padding_of_a_shard(stored: Stored) -> None:
    """Several things in one tensor, of each of which a rank has a part."""
    weights, x = stored.weights("dense"), torch.rand(3, IN)
    linear = weights.column(("q",), (Shard((slice(4, 6), slice(0, 1)), padding=2),))
    expected = F.linear(x, stored.dense["q"][[4, 5, 0]])
    torch.testing.assert_close(linear(x), F.pad(expected, (0, 2)))
    inputs = Shard((slice(8, 12), slice(0, 4)))
    columns = [*range(8, 12), *range(4)]
    torch.testing.assert_close(
        weights.row("o", inputs)(x[:, columns]),
        F.linear(x[:, columns], stored.dense["o"][:, columns]),
    )
    assert torch.equal(weights.tensor("q.bias", Shard.of_range(2, 4)), stored.tensors["dense.q.bias"][2:4])


def test_what_a_format_does_not_hold_is_dense(stored: Stored) -> None:
    weights, x = stored.weights("packed"), torch.rand(3, IN)
    torch.testing.assert_close(
        weights.column(("head",), (WHOLE,))(x),
        F.linear(x, stored.tensors["packed.head.weight"]),
    )
    assert isinstance(weights.column(("q",), (WHOLE,)), ToyLinear)
    assert isinstance(weights.linear("q"), ToyLinear)
    bias = torch.rand(OUT + 5)
    both = weights.column(("q", "head"), (WHOLE, WHOLE), bias)
    assert isinstance(both, SideBySide)
    assert (both.in_features, both.out_features) == (IN, OUT + 5)
    apart = [F.linear(x, stored.dense["q"]), F.linear(x, stored.tensors["packed.head.weight"])]
    torch.testing.assert_close(both(x), torch.cat(apart, dim=1) + bias)
    assert torch.equal(weights.matrix("head"), stored.tensors["packed.head.weight"])
    torch.testing.assert_close(weights.matrix("q", Shard.of_range(1, 3)), stored.dense["q"][1:3])
    assert weights.has_module("head")
    assert weights.has_module("q"), "whatever its tensors are called"
    assert not weights.has_module("lm_head")


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_a_weight_at_hand_may_have_a_bias(kind: str, stored: Stored) -> None:
    x, weight, bias = torch.rand(3, IN), torch.rand(OUT, IN), torch.rand(OUT)
    linear = stored.weights(kind).packed("head", weight, bias)
    torch.testing.assert_close(linear(x), F.linear(x, weight, bias))


def configure(folder: Path, quantization: object, place: str = "") -> None:
    config = {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps({place: config} if place else config))


@pytest.mark.parametrize("place", ["", "text_config"])
def test_the_checkpoint_says_its_format(place: str, tmp_path: Path) -> None:
    configure(tmp_path, {"quant_method": "toy", "ignored": ["a"]}, place)
    toy, dense = choose_formats(tmp_path, CPU, stored={"toy": Toy.read})
    assert (toy.name, dense.name) == ("toy", "dense")
    assert isinstance(toy, Toy)
    with pytest.raises(ValueError, match="toys are for the CPU"):
        choose_formats(tmp_path, torch.device("meta"), stored={"toy": Toy.read})
    with pytest.raises(ValueError, match=r"'int8' is for dense weights, but .* has toy"):
        choose_formats(tmp_path, CPU, "int8", stored={"toy": Toy.read})


def test_a_format_that_is_not_known_is_refused_by_its_name(tmp_path: Path) -> None:
    configure(tmp_path, {"quant_method": "hqq", "bits": 4})
    with pytest.raises(
        ValueError, match=r"quantised by 'hqq' \(config\.json, key .*\): known are auto-round, awq,"
    ):
        choose_formats(tmp_path, CPU)
    configure(tmp_path, None)
    quantization = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(quantization))
    with pytest.raises(ValueError, match="by 'modelopt' as NVFP4"):
        open_weights(tmp_path, torch.float32, CPU)


def test_activations_are_a_choice_where_weights_are_quantised(tmp_path: Path) -> None:
    configure(tmp_path, {"quant_method": "toy", "ignored": []})
    chosen: list[Activations] = []

    class Grouped(Toy):
        def choose_activations(self, activations: Activations) -> None:
            chosen.append(activations)

        def check_device(self, device: torch.device) -> None:
            """On every one."""

    def read(config: Mapping[str, object]) -> Grouped:
        return Grouped([])

    for activations in Activations:
        choose_formats(tmp_path, CPU, stored={"toy": read}, activations=activations)
    assert chosen == list(Activations)
    with pytest.raises(ValueError, match="'int8' is for the CPU, but this worker computes on meta"):
        choose_formats(tmp_path, torch.device("meta"), stored={"toy": read}, activations="int8")
    with pytest.raises(
        ValueError, match="'none' is for checkpoints whose weights are quantised, not for 'toy'"
    ):
        choose_formats(tmp_path, CPU, stored={"toy": Toy.read}, activations="none")
    configure(tmp_path, None)
    (dense,) = choose_formats(tmp_path, CPU, activations="int8")  # a tower beside a quantised decoder
    assert isinstance(dense, Dense)


def test_dense_weights_may_be_quantised_at_load(tmp_path: Path) -> None:
    configure(tmp_path, None)
    assert [format.name for format in choose_formats(tmp_path, CPU)] == ["dense"]
    assert [format.name for format in choose_formats(tmp_path, CPU, "int8")] == ["int8", "dense"]
    for name in ("int8", "int4", "fp8"):
        made, _ = choose_formats(tmp_path, torch.device("cuda", 0), name)
        assert isinstance(made, GroupedAtLoad), "the CPU's kernels are for CPUs"
