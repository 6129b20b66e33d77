"""The FlashAttention-3 backend on a stand-in that takes the same arguments and computes in float64."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.workers.llm.attention.spans import make_layer, make_spans, reference
from workers.llm.attention.base import SequencePart
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.spec import Paged

pytestmark = pytest.mark.interpreter

CPU = torch.device("cpu")


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, page_table: Tensor,
    softmax_scale: float, causal: bool,
    cu_seqlens_q: Tensor | None = None, max_seqlen_q: int | None = None, num_splits: int = 0,
) -> Tensor:  # fmt: skip
    """q [batch, 1, heads, dim], or [tokens, heads, dim] with cumulative lengths; caches [pages, page size, kv
    heads, dim]."""
    assert causal
    assert softmax_scale == q.shape[-1] ** -0.5
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1
    starts = [*range(len(q) + 1)] if cu_seqlens_q is None else cu_seqlens_q.tolist()
    counts = [stop - start for start, stop in itertools.pairwise(starts)]
    assert max_seqlen_q in (None, max(counts))
    cache = torch.cat([k_cache, v_cache], dim=2)
    spans = [
        SequencePart(count, length - count, table)
        for count, length, table in zip(counts, cache_seqlens.tolist(), page_table.tolist(), strict=True)
    ]  # fmt: skip
    flat = q.flatten(0, 1) if cu_seqlens_q is None else q
    return reference(cache.flatten(0, 1), cache.shape[1], spans, flat).to(q.dtype).view(q.shape)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    stand_in = types.ModuleType("flash_attn_interface")
    stand_in.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    stand_in.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]  # find_spec looks for it
    monkeypatch.setitem(sys.modules, "flash_attn_interface", stand_in)
    yield stand_in
    sys.modules.pop("workers.llm.attention.flash3", None)


def test_mixed_steps_are_attended_as_by_the_kernels(module: types.ModuleType) -> None:
    import random

    from workers.llm.backends import choose_backend

    torch.manual_seed(0)
    backend = choose_backend("flash3", CPU)
    cache = PagedTensors([Paged(2, 16)], 40, 4, torch.float32, CPU)
    attention, layer = backend.attention(cache), make_layer(0, 6, 2, 16)
    cache.tensors[0].zero_()
    spans = make_spans(random.Random(0), 4, 40, [(1, 9), (1, 0), (5, 7), (12, 0)])
    for span in spans:
        slots = [span.block_table[position // 4] * 4 + position % 4 for position in range(span.num_computed)]
        cache.tensors[0][slots] = torch.randn(len(slots), 4, 16)
    qkv = torch.randn(19, 6 + 4, 16)
    step = attention.plan(spans)
    step.write(layer, qkv, step.rotary(torch.randn(19, 8), torch.float32))
    expected = reference(cache.tensors[0], 4, spans, qkv[:, :6])
    torch.testing.assert_close(step.attend(layer, qkv).double(), expected, atol=1e-5, rtol=1e-5)


def test_without_the_package_it_is_said() -> None:
    from workers.llm.backends import choose_backend

    with pytest.raises(ValueError, match="flash_attn_interface"):
        choose_backend("flash3", CPU)
