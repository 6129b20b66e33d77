"""All units of the pipeline: what the supervisor decides from what their workers have reported.

Pure but for `kill` and `Unit.on_end`, which kill: no socket, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence

from launcher.units import Child, Unit
from pipeline.wire.base import PoolClosed
from pipeline.wire.control import StatusMessage, WorkerState
from pipeline.wire.topology import Role, WorkerId

# By the owner of a pool: the roles that map it.
MAPPERS: dict[Role, tuple[Role, ...]] = {
    Role.VIT: (Role.LLM, Role.CARRIER),
    Role.PREPROCESS: (Role.VIT, Role.CARRIER),
    Role.CARRIER: (Role.LLM, Role.VIT),
}


class Fleet:
    def __init__(self, units: Sequence[Unit], leads: Sequence[int]) -> None:
        """`leads`: rank 0 of each LLM group, as its rank in the pipeline."""
        self.units = list(units)
        self._unit_of = {worker: unit for unit in self.units for worker in unit.members}
        self._groups = [WorkerId(Role.LLM, lead) for lead in leads]

    def unit_of(self, worker: WorkerId) -> Unit:
        return self._unit_of[worker]

    @property
    def workers(self) -> list[WorkerId]:
        return list(self._unit_of)

    @property
    def children(self) -> list[Child]:
        return [child for unit in self.units for child in unit.children.values()]

    @property
    def is_started(self) -> bool:
        return self._has_group and all(unit.has_served for unit in self.present)

    @property
    def is_serving(self) -> bool:
        return self._has_group and all(unit.is_serving for unit in self.present)

    @property
    def present(self) -> list[Unit]:
        """Units whose nodes have joined."""
        return [unit for unit in self.units if not unit.is_absent]

    @property
    def _has_group(self) -> bool:
        """Whether some node has an LLM: without one there is nothing to serve."""
        return any(unit.role is Role.LLM for unit in self.present)

    def epochs(self) -> dict[str, int]:
        return {str(worker): unit.epoch for worker, unit in self._unit_of.items()}

    def states(self, now: float) -> tuple[WorkerState, ...]:
        return tuple(state for unit in self.units for state in unit.states(now))

    def reports(self, now: float) -> list[str]:
        return [report for unit in self.units if (report := unit.report(now))]

    def wakes_at(self) -> float:
        return min(unit.wakes_at() for unit in self.units)

    def sender_of(self, message: StatusMessage) -> tuple[Unit, Child] | None:
        """None for a message of an incarnation that is dead, or unknown."""
        unit = self._unit_of.get(message.sender)
        child = unit.children.get(message.sender) if unit is not None else None
        return None if unit is None or child is None or message.epoch != child.epoch else (unit, child)

    def is_idle(self, since: float, *others: WorkerId) -> bool:
        """Whether preprocess, all groups and `others` have reported since then that no request is open."""
        groups = [lead for lead in self._groups if not self._unit_of[lead].is_absent]
        reporters = [WorkerId(Role.PREPROCESS), *groups, *others]
        children = [self._unit_of[worker].children.get(worker) for worker in reporters]
        return all(
            child and child.stats and child.stats_time > since and not child.stats.num_open_requests
            for child in children
        )

    def is_idle_at(self, node: int, since: float) -> bool:
        """Whether the groups of a node have reported since then that no request is open."""
        leads = [lead for lead in self._groups if node in self._unit_of[lead].nodes]
        children = [self._unit_of[lead].children.get(lead) for lead in leads]
        return all(
            child is None or (child.stats and child.stats_time > since and not child.stats.num_open_requests)
            for child in children
        )

    def close_groups(self) -> None:
        """Clients keep new requests back until `replace_weights`."""
        for unit in self.units:
            unit.is_closed = unit.role is Role.LLM

    def kill(self, worker: WorkerId) -> bool:
        """Kills a worker, as from outside. False for one that does not serve: a start that is killed may end
        the pipeline."""
        unit = self._unit_of.get(worker)
        if unit is None or not unit.is_serving:
            return False
        unit.children[worker].process.kill()
        return True

    def replace_weights(self, now: float) -> None:
        """Ends ViTs and LLMs at once: no request may meet workers of two generations."""
        for unit in self.units:
            unit.is_closed = False
            if unit.holds_weights and unit.is_alive:
                unit.on_end(now)

    def on_reaped(self, dead: Unit, now: float, executed: tuple[bytes, ...]) -> None:
        mappers = {
            child.worker for unit in self.units if unit.is_serving and set(unit.nodes) & set(dead.nodes)
            for child in unit.children.values() if child.worker.role in MAPPERS.get(dead.role, ())
        }  # fmt: skip
        dead.on_reaped(now, executed, mappers)
        for unit in self.units:
            # dead workers map nothing, and their successors never did
            unit.unmapping.difference_update(dead.members)

    def on_pool_closed(self, message: PoolClosed) -> None:
        for unit in self.units:
            if message.pool_id == str(unit.members[0]) and message.pool_epoch == unit.epoch - 1:
                unit.unmapping.discard(message.sender)
