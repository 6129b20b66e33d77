"""Every kind of attack at a small size; at full size: `python -m tools.attack`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers import Server
from tools.attack import ATTACKER, KINDS, MOST_RATIO, VICTIM, Size, attack
from tools.mutated_bodies import OPTIONS, Sender
from tools.schema_attack import attack as schema_attack

SMALL = Size(seconds=2.0, pictures=2, connections=8, num_quiet=4)
QUIET_FLOOR_S = 1.0  # beside other tests a request of some 50 ms takes up to a second


@pytest.fixture(scope="module")
def attacked() -> Iterator[Server]:
    options = ("--api-key", ATTACKER, VICTIM, *OPTIONS, "--media-timeout-s", "2")
    with Server(*options) as server:
        yield server


@pytest.mark.parametrize("kind", KINDS)
async def test_an_attack_stops_nobody_else(kind: str, attacked: Server) -> None:
    found = await attack(kind, f"{attacked.url}/v1", attacked.run_dir, SMALL, 1)
    assert found.faults == []
    assert found.restarts == []
    found.quiet = [max(QUIET_FLOOR_S, seconds) for seconds in found.quiet]
    assert found.ratio <= MOST_RATIO, (found.quiet, found.beside)


def test_the_server_keeps_to_its_description(attacked: Server) -> None:
    found = schema_attack(attacked.url, ATTACKER, num_examples=2, seed=1)
    assert found.violations == {}
    assert {200, 400} <= {status for _, _, status in found.statuses}


def test_mutated_bodies_are_answered_as_they_should_be(attacked: Server) -> None:
    found = Sender(f"{attacked.url}/v1", attacked.process.pid, 1, key=ATTACKER).run(150)
    assert found.violations == []
    assert {"200", "stream", "400"} <= found.seconds.keys()
