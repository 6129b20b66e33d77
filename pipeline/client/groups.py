"""The groups of LLM ranks: which serve, and which know this client. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.wire.clients import Welcome
from pipeline.wire.control import WorkerState
from pipeline.wire.topology import Role, WorkerId

BUSY_AFTER_S = 3.0  # a group whose last stats are older is in a long step, and answers after it


class Groups:
    """A group is named by its lead, the rank of its rank 0 among all LLM ranks."""

    def __init__(self, epochs: Mapping[WorkerId, int]) -> None:
        """`epochs` of the workers, as the client's sockets are connected."""
        self._epochs = epochs
        self.leads: tuple[int, ...] = ()  # empty until the client is connected
        self._welcomes: dict[int, Welcome] = {}  # the last of each lead
        self._states: dict[WorkerId, WorkerState] = {}

    def on_states(self, states: Sequence[WorkerState]) -> None:
        self._states = {state.worker: state for state in states}

    def on_welcome(self, welcome: Welcome) -> None:
        """From now on the group runs this client's requests."""
        self._welcomes[welcome.sender.rank] = welcome

    def forget_welcomes(self) -> None:
        self._welcomes.clear()

    def _has_welcomed(self, lead: int) -> bool:
        welcome = self._welcomes.get(lead)
        return welcome is not None and welcome.epoch == self._epochs[WorkerId(Role.LLM, lead)]

    def _is_down(self, lead: int) -> bool:
        """Whether the launcher says that a group is down. A group without a state counts as up."""
        state = self._states.get(WorkerId(Role.LLM, lead))
        return state is not None and not state.is_ready

    @property
    def known(self) -> dict[int, Welcome]:
        """The groups that serve and know this client, by lead.

        Any other group would interrupt this client's requests.
        """
        return {lead: self._welcomes[lead] for lead in self._serving if self._has_welcomed(lead)}

    @property
    def ungreeted(self) -> tuple[int, ...]:
        """The groups that serve and do not know this client yet."""
        return tuple(lead for lead in self._serving if not self._has_welcomed(lead))

    @property
    def _serving(self) -> list[int]:
        return [lead for lead in self.leads if not self._is_down(lead)]

    def is_in_long_step(self, lead: int | None) -> bool:
        """Whether a group that may run a request is in a long step, and so answers no messages. `lead` is
        None where any group may run the request.

        The launcher watches for steps that never end.
        """
        leads = self.leads if lead is None else (lead,)
        states = [self._states.get(WorkerId(Role.LLM, each)) for each in leads]
        return any(state is not None and state.is_ready and state.silent_s > BUSY_AFTER_S for state in states)
