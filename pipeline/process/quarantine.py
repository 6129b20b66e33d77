"""Which requests are to run alone here, as the launcher says: `launcher/quarantine.py` keeps who they are.

Every worker that may execute a resubmitted request knows of it before that:

- The successor of the dead worker is told at its start (`WorkerSpec.quarantined`). Its predecessor was reaped
  before, so that list is complete, and no message can be faster.
- A neighbour of the same role (another ViT, the LLM of another group) lives, and learns it on the control
  edge. There the launcher says the death and the quarantine in one message, and a client submits the request
  again only after it has read that message; the request then still has to pass preprocess and, with pictures,
  a ViT. The message is older by all these hops, and is asked about as late as a batch is made. Nothing
  guarantees the order of two sockets, though: should the request win, it executes once more in company, as it
  did the first time.
- Workers of other roles need not know: where preprocess died of a request, the LLM does not run it alone.
  Rank 0 alone looks at all roles, to report the first new token; where it misses one, the request stays in
  quarantine until its time is over, which costs speed and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pipeline.process.flight_recorder import digest_of
from pipeline.wire.topology import Role


class Quarantine:
    """What a worker of this role knows of it."""

    def __init__(self, role: Role, quarantined: Mapping[Role, Collection[bytes]]) -> None:
        self._role = role
        self.learn(quarantined)

    def learn(self, quarantined: Mapping[Role, Collection[bytes]]) -> None:
        """Takes the place of all that was known."""
        self._here = frozenset(quarantined.get(self._role, ()))
        self._anywhere = frozenset(digest for digests in quarantined.values() for digest in digests)

    def runs_alone(self, request_id: str) -> bool:
        """Whether a worker of this role died while it executed the request, which has yielded no token
        since."""
        return bool(self._here) and digest_of(request_id) in self._here

    def __contains__(self, request_id: str) -> bool:
        """Whether that is so in any role."""
        return bool(self._anywhere) and digest_of(request_id) in self._anywhere


def nobody(request_id: str) -> bool:
    """In place of `runs_alone`, where nothing dies."""
    return False
