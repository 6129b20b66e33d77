"""The layout of quantised matrices: what is widened again is what was arranged, whatever the groups are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.nn.weights.grouped import GroupedLinear, GroupedWeight, NumberKind, arrange, stack

GROUPS = {
    "128": torch.arange(384) // 128,
    "128, the last shorter": torch.arange(200) // 128,
    "64": torch.arange(192) // 64,
    "32": torch.arange(96) // 32,
    "16": torch.arange(96) // 16,
    "96": torch.arange(288) // 96,
    "one": torch.zeros(72, dtype=torch.int64),
    "a rank's half": (torch.arange(1710) + 1710) // 128,
    "shuffled": (torch.arange(256) // 64)[torch.randperm(256, generator=torch.Generator().manual_seed(1))],
    "shuffled, of several sizes": torch.randint(0, 5, (150,), generator=torch.Generator().manual_seed(2)),
}
KINDS = [(NumberKind.INT4, True), (NumberKind.INT4, False), (NumberKind.INT8, False), (NumberKind.FP8, False)]


def random_weight(
    kind: NumberKind, has_zeros: bool, groups: Tensor, out: int
) -> tuple[GroupedWeight, Tensor]:
    """A weight, and the matrix [out, in] that it stands for."""
    generator = torch.Generator().manual_seed(3)
    shape, num_groups = (out, len(groups)), int(groups.max()) + 1
    scales = torch.rand(out, num_groups, generator=generator) + 0.5
    zeros, numbers = None, torch.randn(shape, generator=generator)
    if kind is NumberKind.FP8:
        numbers = numbers.to(torch.float8_e4m3fn)
    elif kind is NumberKind.INT8:
        numbers = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    else:
        numbers = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
    wide = numbers.float()
    if has_zeros:
        zeros = torch.randint(0, 16, scales.shape, generator=generator, dtype=torch.uint8)
        wide = wide - zeros[:, groups]
    elif kind is NumberKind.INT4:
        wide = wide - 8
    return arrange(kind, numbers, scales, zeros, groups), wide * scales[:, groups]


@pytest.mark.parametrize(("kind", "has_zeros"), KINDS)
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_products_are_those_of_the_dense_matrix(kind: NumberKind, has_zeros: bool, groups: Tensor) -> None:
    weight, dense = random_weight(kind, has_zeros, groups, 70)
    x, bias = torch.randn(3, len(groups), dtype=torch.float64), torch.randn(70)
    assert weight.group_size in (32, 64) or weight.group_size % 128 == 0
    found = GroupedLinear(weight, bias)(x.float())
    torch.testing.assert_close(
        found.double(), x @ dense.double().t() + bias, rtol=1e-5, atol=1e-4 * dense.abs().max()
    )
    if weight.order is None:
        assert torch.equal(weight.widened(slice(None), torch.float32), dense)


def test_several_weights_are_one_where_their_layouts_agree() -> None:
    first, dense = random_weight(NumberKind.INT4, True, GROUPS["shuffled"], 70)
    second, other = random_weight(NumberKind.INT4, True, GROUPS["shuffled"], 9)
    both = stack([first, second])
    assert both is not None
    x = torch.randn(2, 256)
    torch.testing.assert_close(
        GroupedLinear(both)(x), x @ torch.cat((dense, other)).t(), rtol=1e-4, atol=1e-3
    )
    assert stack([first, random_weight(NumberKind.INT4, False, GROUPS["shuffled"], 9)[0]]) is None
    assert stack([first, random_weight(NumberKind.INT8, False, GROUPS["shuffled"], 9)[0]]) is None
    assert stack([first, first._replace(order=first.order.flip(0))]) is None  # type: ignore[union-attr]
