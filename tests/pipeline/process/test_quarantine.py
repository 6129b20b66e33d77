"""What a worker knows of the quarantine."""

from __future__ import annotations

from pipeline.process.flight_recorder import digest_of
from pipeline.process.quarantine import Quarantine
from pipeline.wire.topology import Role


def test_a_request_runs_alone_where_a_worker_died_of_it_and_nowhere_else() -> None:
    told = {Role.VIT: (digest_of("v"),), Role.LLM: (digest_of("l"),)}
    for role, alone in ((Role.VIT, ["v"]), (Role.LLM, ["l"]), (Role.PREPROCESS, [])):
        quarantine = Quarantine(role, told)
        assert [name for name in ("v", "l", "other") if quarantine.runs_alone(name)] == alone
        assert [name for name in ("v", "l", "other") if name in quarantine] == ["v", "l"], "in any role"


def test_the_last_word_counts() -> None:
    quarantine = Quarantine(Role.LLM, {})
    assert not quarantine.runs_alone("a")
    quarantine.learn({Role.LLM: (digest_of("a"),)})
    assert quarantine.runs_alone("a")
    quarantine.learn({Role.LLM: (digest_of("b"),)})
    assert not quarantine.runs_alone("a")
    assert "a" not in quarantine
    assert quarantine.runs_alone("b")
