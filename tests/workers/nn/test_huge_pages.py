"""Huge pages never change what is in memory."""

from __future__ import annotations

import torch

from workers.nn.native.huge_pages import advise, collapse


def test_any_memory_may_be_asked_for() -> None:
    x = torch.arange(1 << 20)
    for ask in (advise, collapse):
        ask(x.data_ptr() + 8, x.nbytes - 16)
        ask(x.data_ptr(), 10)
        ask(x.data_ptr(), 0)
    assert torch.equal(x, torch.arange(1 << 20))
