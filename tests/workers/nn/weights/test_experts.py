"""The experts of a layer: every layout of a checkpoint, every share of a rank, each weight read once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.workers.nn.weights.test_weights import Toy, ToyLinear
from workers.llm.parallel import TensorParallel, share_experts
from workers.nn.fused import Kernels
from workers.nn.loader import Checkpoint
from workers.nn.weights.base import Experts, Format, Linear
from workers.nn.weights.dense import Dense
from workers.nn.weights.experts import ListedExperts, StackedExperts
from workers.nn.weights.int8 import Int8, Int8Linear, PanelLinear
from workers.nn.weights.shard import ExpertsShard
from workers.nn.weights.weights import Weights

CPU = torch.device("cpu")
COUNT, HIDDEN, SIZE = 6, 24, 16
LAYOUTS = ("one by one", "fused", "fused and transposed")


def make(folder: Path, layout: str, size: int = SIZE, hidden: int = HIDDEN) -> tuple[Tensor, Tensor]:
    """Random experts in a checkpoint; gate_up [COUNT, 2 · size, hidden] and down [COUNT, hidden, size]."""
    torch.manual_seed(0)
    gate_up, down = torch.randn(COUNT, 2 * size, hidden), torch.randn(COUNT, hidden, size)
    tensors = {"gate_up_proj": gate_up, "down_proj": down}
    if layout == "fused and transposed":
        tensors = {name: tensor.mT.contiguous() for name, tensor in tensors.items()}
    elif layout == "one by one":
        parts = {"gate": gate_up[:, :size], "up": gate_up[:, size:], "down": down}
        tensors = {
            f"{number}.{name}_proj.weight": part[number].contiguous()
            for name, part in parts.items()
            for number in range(COUNT)
        }
    save_file({f"mlp.experts.{name}": tensor for name, tensor in tensors.items()}, folder / "a.safetensors")
    return gate_up, down


def load(folder: Path, shard: ExpertsShard, format: Format | None = None) -> Experts:
    checkpoint = Checkpoint(folder, torch.float32, CPU)
    return Weights(checkpoint, [format or Dense()]).under("mlp").experts("experts", shard, None)


def whole(size: int = SIZE, hidden: int = HIDDEN) -> ExpertsShard:
    return share_experts(COUNT, hidden, size, TensorParallel())


def choose(num_tokens: int) -> tuple[Tensor, Tensor]:
    chosen = torch.stack([torch.randperm(COUNT)[:3] for _ in range(num_tokens)])
    return chosen, torch.rand(num_tokens, 3)


def reference(x: Tensor, weights: tuple[Tensor, Tensor], chosen: Tensor, shares: Tensor) -> Tensor:
    gate, up = torch.einsum("eoh,nh->neo", weights[0], x).chunk(2, dim=-1)
    of_all = torch.einsum("ehi,nei->neh", weights[1], F.silu(gate) * up)
    picked = of_all.gather(1, chosen[..., None].expand(-1, -1, x.shape[1]))
    return (picked * shares[..., None]).sum(1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_tokens", [1, 2, 50])
def test_every_layout_is_the_same_layer(layout: str, num_tokens: int, tmp_path: Path) -> None:
    weights = make(tmp_path, layout)
    x, picks = torch.randn(num_tokens, HIDDEN), choose(num_tokens)
    torch.testing.assert_close(
        load(tmp_path, whole())(x, *picks), reference(x, weights, *picks), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("has_whole_experts", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_the_parts_of_all_ranks_add_up(
    layout: str, has_whole_experts: bool, num_tokens: int, tmp_path: Path
) -> None:
    weights = make(tmp_path, layout)
    x, picks = torch.randn(num_tokens, HIDDEN), choose(num_tokens)
    total = torch.zeros_like(x)
    for rank in range(2):
        parallel = TensorParallel(rank, 2, has_whole_experts=has_whole_experts)
        total += load(tmp_path, share_experts(COUNT, HIDDEN, SIZE, parallel))(x, *picks)
    torch.testing.assert_close(total, reference(x, weights, *picks), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize(("size", "hidden"), [(12, 24), (24, 24)])
def test_a_square_tensor_is_told_by_the_other(layout: str, size: int, hidden: int, tmp_path: Path) -> None:
    weights = make(tmp_path, layout, size, hidden)
    x, picks = torch.randn(4, hidden), choose(4)
    torch.testing.assert_close(
        load(tmp_path, whole(size, hidden))(x, *picks), reference(x, weights, *picks), rtol=1e-4, atol=1e-4
    )


def test_shapes_that_are_neither_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "fused")
    with pytest.raises(ValueError, match=r"mlp\.experts have shapes \(\(6, 32, 24\), \(6, 24, 16\)\), not"):
        load(tmp_path, whole(size=17))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_expert_at_a_time_is_read(layout: str, tmp_path: Path) -> None:
    """Never a layer's whole tensor, of which a copy would be in memory beside the packed experts."""
    make(tmp_path, layout)
    read: list[int] = []

    class Watched(Checkpoint):
        def load(self, *arguments: object, **options: object) -> Tensor:
            part = super().load(*arguments, **options)  # type: ignore[arg-type]
            read.append(part.numel())
            return part

    shard = share_experts(COUNT, HIDDEN, SIZE, TensorParallel(1, 2))
    Weights(Watched(tmp_path, torch.float32, CPU), [Dense()]).experts("mlp.experts", shard, None)
    assert max(read) <= 2 * SIZE // 2 * HIDDEN
    assert sum(read) == COUNT * 3 * SIZE // 2 * HIDDEN, "this rank's half, once"


def test_progress_counts_tensors_not_their_parts(tmp_path: Path) -> None:
    gate_up, down = make(tmp_path, "fused")
    save_file({"other": torch.zeros(1)}, tmp_path / "b.safetensors")
    told: list[int] = []
    checkpoint = Checkpoint(tmp_path, torch.float32, CPU, lambda done, total: told.append(done))
    Weights(checkpoint, [Dense()]).experts("mlp.experts", whole(), None)
    assert told == sorted(told)
    assert (len(told), told[0], told[-1]) == (3 * COUNT, gate_up.nbytes, gate_up.nbytes + down.nbytes)


class Counted(Linear):
    def __init__(self, linear: Linear) -> None:
        super().__init__(linear.out_features, linear.in_features)
        self._linear, self.num_calls = linear, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        return self._linear(x)


@pytest.mark.parametrize("num_tokens", [1, 8, 100])
def test_a_step_reads_each_chosen_expert_once(num_tokens: int, tmp_path: Path) -> None:
    make(tmp_path, "fused")
    made = load(tmp_path, whole())
    assert isinstance(made, ListedExperts)
    counted = [(Counted(gate_up), Counted(down)) for gate_up, down in made.layers]
    chosen = torch.tensor([[0, 5, 2], [5, 2, 4]])[torch.arange(num_tokens) % 2]
    ListedExperts(counted, 0)(torch.randn(num_tokens, HIDDEN), chosen, torch.rand(num_tokens, 3))
    expected = [int(number in chosen) for number in range(COUNT)]
    assert [gate_up.num_calls for gate_up, _ in counted] == expected
    assert [down.num_calls for _, down in counted] == expected


def test_experts_of_another_format_one_by_one(tmp_path: Path) -> None:
    shard = whole()
    tensors, dense = {}, {}
    for number in range(COUNT):
        for name, shape in (("gate", (SIZE, HIDDEN)), ("up", (SIZE, HIDDEN)), ("down", (HIDDEN, SIZE))):
            packed, scales = (
                torch.randint(-99, 99, shape, dtype=torch.int8),
                torch.rand(shape[0], shape[1] // 4),
            )
            tensors[f"mlp.experts.{number}.{name}_proj.packed"] = packed
            tensors[f"mlp.experts.{number}.{name}_proj.scales"] = 0.01 * scales
            dense[name, number] = packed * (0.01 * scales).repeat_interleave(4, dim=1)
    save_file(tensors, tmp_path / "a.safetensors")
    gate, up, down = (torch.stack([dense[name, n] for n in range(COUNT)]) for name in ("gate", "up", "down"))
    made = load(tmp_path, shard, Toy([]))
    assert isinstance(made, ListedExperts)
    assert isinstance(made.layers[0][0], ToyLinear)
    x, picks = torch.randn(5, HIDDEN), choose(5)
    expected = reference(x, (torch.cat((gate, up), dim=1), down), *picks)
    torch.testing.assert_close(made(x, *picks), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_int8_quantises_experts(layout: str, tmp_path: Path) -> None:
    weights = make(tmp_path, layout)
    made = load(tmp_path, whole(), Int8())
    assert isinstance(made, ListedExperts)
    assert all(isinstance(linear, PanelLinear | Int8Linear) for pair in made.layers for linear in pair)
    x, picks = torch.randn(20, HIDDEN), choose(20)
    expected = reference(x, weights, *picks)
    error = float((made(x, *picks) - expected).norm() / expected.norm())
    assert 0 < error < 0.05


def test_kernels_get_the_experts_stacked(tmp_path: Path) -> None:
    gate_up, down = make(tmp_path, "fused and transposed")
    seen: list[tuple[object, ...]] = []

    def compute(*arguments: object) -> Tensor:
        seen.append(arguments)
        return torch.zeros(1)

    shard = share_experts(COUNT, HIDDEN, SIZE, TensorParallel(1, 2, has_whole_experts=True))
    kernels = Kernels(compute, compute, lambda logits, k: (logits, logits), compute)
    weights = Weights(Checkpoint(tmp_path, torch.float32, CPU), [Dense()])
    made = weights.experts("mlp.experts", shard, kernels)
    assert isinstance(made, StackedExperts)
    x, (chosen, shares) = torch.randn(2, HIDDEN), choose(2)
    made(x, chosen, shares)
    _, of_gate_up, of_down, *rest = seen[0]
    assert isinstance(of_gate_up, Tensor)
    assert isinstance(of_down, Tensor)
    assert torch.equal(of_gate_up, gate_up[3:])
    assert torch.equal(of_down, down[3:])
    assert rest[-1] == 3
    with_int8 = Weights(Checkpoint(tmp_path, torch.float32, CPU), [Int8()])
    assert isinstance(with_int8.experts("mlp.experts", shard, kernels), ListedExperts)


@pytest.mark.parametrize(
    ("size", "has_whole_experts", "words"),
    [(4, True, "tp 4 does not divide the model's 6 experts"), (5, False, "tp 5 .* intermediate size 16 of")],
)
def test_experts_that_ranks_do_not_divide_are_refused(size: int, has_whole_experts: bool, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        share_experts(COUNT, HIDDEN, SIZE, TensorParallel(0, size, has_whole_experts=has_whole_experts))
