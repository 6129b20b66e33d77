"""The process of the endpoint, as far as it can be seen without one."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.process.phases import WAITING
from workers.api import worker


async def test_a_wait_for_the_llm_is_told_so_that_it_is_not_taken_for_a_standstill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker, "WAITING_INTERVAL_S", 0.01)
    told: list[tuple[str, int, int]] = []
    context: Any = SimpleNamespace(progress=lambda *words: told.append(words))
    task = asyncio.create_task(worker.tell_what_is_waited_for(context))
    await asyncio.sleep(0.2)
    task.cancel()
    assert len(told) > 3
    assert set(told) == {(f"{WAITING}the LLM", 0, 1)}
