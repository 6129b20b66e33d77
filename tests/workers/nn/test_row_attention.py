"""Attention of many rows beside float64, with every instruction set that this processor has for it, and
beside torch's in the same type: what is computed in bfloat16 is allowed its error, but not much more."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.workers.nn.native_versions import each_rows_version
from workers.nn.native import operators, row_attention
from workers.nn.native.row_attention import KeyBlocks, RowSegment, RowSegments

__all__ = ["each_rows_version"]
pytestmark = pytest.mark.usefixtures("each_rows_version")


def random_rows(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape)).bfloat16()


def mask_of(num_rows: int, num_keys: int, is_causal: bool) -> Tensor | None:
    return torch.ones(num_rows, num_keys, dtype=torch.bool).tril(num_keys - num_rows) if is_causal else None


def by_torch(q: Tensor, keys: Tensor, values: Tensor, is_causal: bool) -> Tensor:
    """In the type of its arguments [rows, heads, head_dim]."""
    heads = (x.transpose(0, 1)[None] for x in (q, keys, values))
    mask = mask_of(len(q), len(keys), is_causal)
    return F.scaled_dot_product_attention(*heads, mask, enable_gqa=True)[0].transpose(0, 1)


def by_kernel(q: Tensor, keys: Tensor, values: Tensor, is_causal: bool) -> Tensor:
    out = torch.full_like(q, math.nan)
    segments = RowSegments.of([RowSegment(0, 0, len(q), len(keys))])
    row_attention.attend(q, keys, values, out, segments, q.shape[-1] ** -0.5, is_causal=is_causal)
    return out


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).pow(2).mean().sqrt())


def check(q: Tensor, keys: Tensor, values: Tensor, is_causal: bool, found: Tensor | None = None) -> None:
    expected = by_torch(q.double(), keys.double(), values.double(), is_causal)
    if found is None:
        found = by_kernel(q, keys, values, is_causal)
    torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0.02)
    assert error(found, expected) < 1.25 * error(by_torch(q, keys, values, is_causal), expected) + 1e-5


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize(
    ("rows", "keys", "heads", "kv_heads", "dim"),
    [
        (1, 1, 1, 1, 64),
        (64, 64, 8, 8, 80),
        (300, 300, 3, 3, 72),
        (100, 700, 14, 2, 64),
        (333, 333, 6, 3, 128),
        (17, 520, 4, 1, 256),
        (40, 290, 9, 9, 16),
        (33, 600, 3, 3, 48),
        (31, 33, 2, 2, 20),
    ],
)
@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_of_many_rows(
    rows: int, keys: int, heads: int, kv_heads: int, dim: int, is_causal: bool, scale: float
) -> None:  # fmt: skip
    torch.manual_seed(rows)
    q, k = random_rows(rows, heads, dim, scale=scale), random_rows(keys, kv_heads, dim, scale=scale)
    check(q, k, random_rows(keys, kv_heads, dim), is_causal)


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_reference_rises_with_the_scores(is_causal: bool) -> None:
    """Far above all that came before, at any place of a chunk, of a block and of a head, and back again."""
    torch.manual_seed(1)
    q, k, v = random_rows(70, 2, 64), random_rows(900, 2, 64), random_rows(900, 2, 64)
    q[::3] = q[::3].abs()
    for place, factor in ((5, 3), (33, 9), (250, 20), (256, 40), (300, 80), (700, 160), (899, 5)):
        k[place] = factor * k[place].abs()
    check(q, k, v, is_causal)
    check(q, -k, v, is_causal)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Wherever a prompt is cut, its rows are the same: also where neighbours raise their references."""
    torch.manual_seed(2)
    q, k, v = random_rows(400, 6, 64, scale=3), random_rows(400, 2, 64, scale=3), random_rows(400, 2, 64)
    q[100:140] *= 30
    whole = by_kernel(q, k, v, True)
    for cuts in ((0, 17, 400), (0, 64, 128, 400), (0, 399, 400)):
        parts = [
            by_kernel(q[start:stop], k[:stop], v[:stop], True) for start, stop in itertools.pairwise(cuts)
        ]
        assert torch.equal(torch.cat(parts), whole), cuts


@pytest.mark.parametrize("heads_at_once", [1, 3])
def test_heads_a_few_at_a_time_are_as_all_at_once(
    heads_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    q, k, v = random_rows(150, 10, 64), random_rows(600, 5, 64), random_rows(600, 5, 64)
    expected = by_kernel(q, k, v, True)
    monkeypatch.setattr(row_attention, "PACKED_BYTES", heads_at_once * 768 * 4 * 64)
    assert torch.equal(by_kernel(q, k, v, True), expected)


def test_each_thread_may_have_heads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    q, k, v = (random_rows(3, 130, 8, 80).transpose(1, 2) for _ in "qkv")
    found = [torch.empty_like(q) for _ in range(2)]
    monkeypatch.setattr(row_attention, "UNITS", 0)
    assert row_attention.attend_within(q, k, v, found[0])
    monkeypatch.setattr(row_attention, "UNITS", 1 << 20)
    assert row_attention.attend_within(q, k, v, found[1])
    assert torch.equal(*found)
    for ours, *theirs in zip(found[0], q, k, v, strict=True):
        queries, keys, values = (x.transpose(0, 1) for x in theirs)
        check(queries, keys, values, False, ours.transpose(0, 1))


def test_segments_of_some_heads_and_some_rows() -> None:
    """As a forward in blocks asks for them; the rest of the result is left alone."""
    torch.manual_seed(5)
    q, k, v = (random_rows(4, 50, 6, 72).transpose(1, 2) for _ in "qkv")
    out = torch.full_like(q, 7.0)
    part = slice(1, 3), slice(2, 5)
    rows = (*part, slice(10, 31))
    assert row_attention.attend_within(q[rows], k[part], v[part], out[rows])
    expected = F.scaled_dot_product_attention(q[rows].double(), k[part].double(), v[part].double())
    torch.testing.assert_close(out[rows].double(), expected, atol=0.01, rtol=0.02)
    out[rows] = 7.0
    assert bool((out == 7.0).all())


def test_keys_lie_in_blocks_of_any_size() -> None:
    torch.manual_seed(6)
    cache = torch.full((40 * 7, 6, 64), math.nan, dtype=torch.bfloat16)
    blocks = torch.randperm(40, dtype=torch.int32)
    lengths, q = (90, 33, 110), random_rows(50 + 33 + 20, 6, 64)
    starts = (0, 50, 83, 103)
    segments, place = [], 0
    for number, length in enumerate(lengths):
        segments.append(RowSegment(starts[number], place, starts[number + 1] - starts[number], length))
        place += -(-length // 7)
    places = [
        (blocks[one.first_key : one.first_key + -(-one.num_keys // 7), None] * 7 + torch.arange(7)).flatten()
        for one in segments
    ]
    for one, rows in zip(segments, places, strict=True):
        cache[rows[: one.num_keys]] = random_rows(one.num_keys, 6, 64)
    out, (keys, values) = torch.empty_like(q), cache.split(3, dim=1)
    row_attention.attend(
        q, keys, values, out, RowSegments.of(segments), 64**-0.5, blocks=KeyBlocks(blocks, 7), is_causal=True
    )
    for one, of_one in zip(segments, places, strict=True):
        rows = slice(one.first_row, one.first_row + one.num_rows)
        seen = of_one[: one.num_keys]
        check(q[rows], keys[seen], values[seen], True, out[rows])


def test_what_is_no_number_stays_none() -> None:
    torch.manual_seed(7)
    q, k, v = random_rows(40, 2, 64), random_rows(300, 2, 64), random_rows(300, 2, 64)
    k[20, 0, 5] = math.nan
    q[3, 1, 0] = math.inf
    found = by_kernel(q, k, v, False)
    assert bool(found[:, 0].isnan().all())
    assert bool(found[3, 1].isnan().all())
    assert not bool(found[4:, 1].isnan().any())


def test_other_tensors_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    q = random_rows(1, 2, 40, 64)
    assert row_attention.takes(q)
    assert not row_attention.takes(q.float())
    assert not row_attention.takes(q.transpose(2, 3))
    assert not row_attention.takes(q.to("meta"))
    out = torch.empty_like(q)
    assert not row_attention.attend_within(q, q, q.transpose(1, 2).contiguous().transpose(1, 2), out)
    monkeypatch.setattr(operators, "kernels", None)
    assert not row_attention.attend_within(q, q, q, out)


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="avx1"):
        operators.kernels.use_rows("avx1")
