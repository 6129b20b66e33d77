"""Who has a place, and who is next."""

from __future__ import annotations

import asyncio

from workers.preprocess.places import Asker, Places


class Holders:
    """Tasks that take a place and keep it until they are told."""

    def __init__(self, count: int) -> None:
        self.places = Places(count)
        self.holding: list[Asker] = []
        self._ends: dict[Asker, list[asyncio.Event]] = {}
        self.tasks: list[asyncio.Task[None]] = []

    async def ask(self, tenant: str, request: str, times: int = 1) -> None:
        self.tasks += [asyncio.create_task(self._hold(Asker(tenant, request))) for _ in range(times)]
        await settle()

    async def _hold(self, asker: Asker) -> None:
        async with self.places.take(asker):
            end = asyncio.Event()
            self._ends.setdefault(asker, []).append(end)
            self.holding.append(asker)
            try:
                await end.wait()
            finally:
                self.holding.remove(asker)

    async def finish(self, tenant: str, request: str) -> None:
        self._ends[Asker(tenant, request)].pop().set()
        await settle()

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.places.check_integrity()
        assert self.places.is_idle

    @property
    def names(self) -> list[str]:
        return sorted(asker.request_id for asker in self.holding)


async def settle() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


async def test_a_request_leaves_one_to_its_tenants_others_and_a_tenant_one_to_others() -> None:
    made = Holders(5)
    await made.ask("greedy", "many", times=10)
    assert made.names == ["many"] * 3
    await made.ask("greedy", "also", times=10)
    assert made.names == ["also"] + ["many"] * 3
    await made.ask("other", "one")
    assert made.names == ["also", "many", "many", "many", "one"]
    await made.finish("greedy", "many")
    assert made.names == ["also", "also", "many", "many", "one"], "who has the fewest goes first"
    await made.finish("other", "one")
    assert len(made.names) == 4, "the last one is kept for others"
    await made.close()


async def test_with_few_places_somebody_still_gets_one() -> None:
    for count in (1, 2):
        made = Holders(count)
        await made.ask("tenant", "r", times=3)
        assert made.names == ["r"]
        await made.close()


async def test_a_place_is_not_lost_with_whoever_left() -> None:
    """Cancelled in the very moment of its turn."""
    made = Holders(1)
    await made.ask("t", "a")
    await made.ask("t", "b")
    await made.ask("t", "c")
    made._ends[Asker("t", "a")].pop().set()
    await asyncio.sleep(0)  # a hands its place to b, whose task has yet to run
    made.tasks[1].cancel()
    await settle()
    assert made.names == ["c"]
    await made.close()
