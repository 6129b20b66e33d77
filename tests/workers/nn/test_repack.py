"""Words of quantised files in the layout's blocks: the kernel's are those of torch's operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.nn.native import operators
from workers.nn.native.repack import repack_inputs, repack_outputs, takes_words
from workers.nn.weights.awq import blocks_of_outputs
from workers.nn.weights.packed import blocks_of, ordered_blocks, put_blocks

pytestmark = pytest.mark.skipif(operators.kernels is None, reason="installed without a C++ compiler")


def random_words(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    return torch.randint(-(2**31), 2**31, (rows, columns), generator=generator).to(torch.int32)


def room(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Rows of blocks between others: of the first result all bytes, of the second those to be filled."""
    all_bytes = torch.full((outputs + 2, inputs // 2 + 48), 171, dtype=torch.uint8)
    return all_bytes, all_bytes[1:-1, 16 : 16 + inputs // 2]


def assert_filled(all_bytes: Tensor, expected: Tensor) -> None:
    count = expected.shape[1]
    assert torch.equal(all_bytes[1:-1, 16 : 16 + count], expected)
    around = torch.cat(
        (all_bytes[0], all_bytes[-1], all_bytes[:, :16].flatten(), all_bytes[:, 16 + count :].flatten())
    )
    assert bool((around == 171).all()), "nothing else is written"


# Words of a cache line, four at a time, single ones; outputs that begin and end within one.
@pytest.mark.parametrize(
    ("skipped", "outputs"), [(0, 8), (0, 128), (0, 296), (3, 5), (7, 1), (5, 150), (2, 20)]
)
@pytest.mark.parametrize("inputs", [32, 96, 128, 288])
def test_words_of_eight_outputs(inputs: int, outputs: int, skipped: int) -> None:
    count = -(-(skipped + outputs) // 8)
    words = random_words(inputs, count + 3)[:, 1 : 1 + count]  # a part of a larger tensor
    all_bytes, blocks = room(outputs, inputs)
    repack_outputs(words, skipped, blocks)
    assert_filled(all_bytes, blocks_of_outputs(words.contiguous())[skipped : skipped + outputs])


@pytest.mark.parametrize("is_by_rows", [True, False])
@pytest.mark.parametrize("outputs", [1, 4, 15, 37])
@pytest.mark.parametrize("inputs", [32, 96, 128, 288])
def test_words_of_eight_inputs(inputs: int, outputs: int, is_by_rows: bool) -> None:
    count = inputs // 8
    words = (
        random_words(outputs, count + 3)[:, 1 : 1 + count]
        if is_by_rows
        else random_words(count, outputs + 3)[:, 1 : 1 + outputs].t()
    )
    all_bytes, blocks = room(outputs, inputs)
    repack_inputs(words, None, blocks)
    assert_filled(all_bytes, blocks_of(words))
    # Some inputs twice, and one not at all.
    order = torch.randint(1, inputs, (inputs + 32,), generator=torch.Generator().manual_seed(1))
    all_bytes, blocks = room(outputs, len(order))
    repack_inputs(words, order, blocks)
    of_torch = words.t().clone(memory_format=torch.contiguous_format)
    assert_filled(all_bytes, ordered_blocks(of_torch, order))


def test_without_the_kernel_torch_repacks(monkeypatch: pytest.MonkeyPatch) -> None:
    words, orders = random_words(5, 8), (None, torch.randperm(64))
    found = []
    for kernels in (operators.kernels, None):
        monkeypatch.setattr(operators, "kernels", kernels)
        blocks = torch.empty(2, 5, 32, dtype=torch.uint8)
        assert takes_words(words, blocks[0]) == (kernels is not None)
        for order, out in zip(orders, blocks, strict=True):
            put_blocks(words, order, out)
        found.append(blocks)
    assert torch.equal(*found)
    assert not takes_words(words.to("meta"), found[0][0].to("meta"))
