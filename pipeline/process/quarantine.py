"""The quarantined requests as one worker knows them; the launcher keeps the list (`launcher/quarantine.py`).

A worker that may execute a resubmitted request learns of its quarantine first:

- The successor of the dead worker gets the list at its start (`WorkerSpec.quarantined`). The dead worker was
  reaped before, so that the list is complete.
- A living worker of the same role (another ViT, the LLM of another group) gets it on `control`. One message
  publishes the death and the quarantine; a client resubmits only after it has read that message, and the
  request still passes preprocess and, with pictures, a ViT. The list is read as late as a batch is made.
  Two sockets have no guaranteed order, though: a request that arrives before the list executes once more in
  a batch with other requests.
- Other roles do not need the list: a request that was executing when preprocess died does not run alone in
  the LLM. Only rank 0 looks at all roles, to report the first new token; without that report the request
  stays quarantined until `QUARANTINE_S` is over, which costs only speed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pipeline.process.flight_recorder import digest_of
from pipeline.wire.topology import Role


class Quarantine:
    """The list, for a worker of `role`."""

    def __init__(self, role: Role, quarantined: Mapping[Role, Collection[bytes]]) -> None:
        self._role = role
        self.learn(quarantined)

    def learn(self, quarantined: Mapping[Role, Collection[bytes]]) -> None:
        """Replaces the list."""
        self._here = frozenset(quarantined.get(self._role, ()))
        self._anywhere = frozenset(digest for digests in quarantined.values() for digest in digests)

    def runs_alone(self, request_id: str) -> bool:
        """Whether the request is quarantined in this role."""
        return bool(self._here) and digest_of(request_id) in self._here

    def __contains__(self, request_id: str) -> bool:
        """Whether the request is quarantined in any role."""
        return bool(self._anywhere) and digest_of(request_id) in self._anywhere


def nobody(request_id: str) -> bool:
    """The default `runs_alone`: no request is quarantined."""
    return False
