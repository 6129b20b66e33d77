"""Who is known to rank 0, without an engine."""

from __future__ import annotations

from typing import Any, cast

import pytest

from pipeline.transport.ends import Subscription
from tests.fakes import LLM_0, FakePublisher
from workers.llm import clients
from workers.llm.clients import GRACE_OF_CLIENTS_S, Clients


def test_so_many_clients_are_known_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "MAX_CLIENTS", 3)
    known = Clients({"sender": LLM_0, "epoch": 1}, cast(Any, None), FakePublisher())
    names = [bytes([number]) * 16 for number in range(5)]
    known.on_subscriptions([Subscription(name, True) for name in names], 0.0)
    assert [name in known for name in names] == [True, True, True, False, False]
    known.on_subscriptions([Subscription(names[0], True), Subscription(names[4], False)], 0.0)
    assert names[0] in known
    known.on_subscriptions([Subscription(names[0], False)], 1.0)
    known.forget(1.0 + GRACE_OF_CLIENTS_S)
    known.on_subscriptions([Subscription(names[3], True)], 3.0)
    assert (names[0] in known, names[3] in known) == (False, True)
