"""Conversations of OpenAI's Responses API that a later request goes on from.

They live in this process, up to a number of bytes: the oldest are forgotten first, all with the process.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import msgspec

from pipeline.wire.errors import RequestError, shown

STORED_BYTES = 256 << 20  # of all conversations, their pictures included
ENTRY_BYTES = 1024  # of one beside its JSON

Json = dict[str, Any]


class StoredResponse(NamedTuple):
    tenant: str
    input: bytes  # JSON: the items of the conversation before the answer, pictures as data URLs
    output: bytes  # JSON: the items of the answer
    response: bytes  # JSON: the answer as the client got it

    @property
    def nbytes(self) -> int:
        return ENTRY_BYTES + len(self.input) + len(self.output) + len(self.response)


class ResponseStore:
    def __init__(self, max_bytes: int = STORED_BYTES) -> None:
        self._max_bytes, self._nbytes = max_bytes, 0
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()

    def put(self, response_id: str, tenant: str, items: bytes, output: list[Json], response: Json) -> None:
        """Keeps a conversation, `items` in JSON and the answer's `output`, unless it is too large alone."""
        made = StoredResponse(tenant, items, msgspec.json.encode(output), msgspec.json.encode(response))
        if made.nbytes > self._max_bytes:
            return
        self._stored[response_id] = made
        self._nbytes += made.nbytes
        while self._nbytes > self._max_bytes:
            _, oldest = self._stored.popitem(last=False)
            self._nbytes -= oldest.nbytes

    def get(self, response_id: str, tenant: str, field: str = "") -> StoredResponse:
        """Raises RequestError (404) for an id that is unknown, or another tenant's."""
        found = self._stored.get(response_id)
        if found is None or found.tenant != tenant:
            what = f"there is no response {shown(response_id)}: it was not stored, or is forgotten"
            code = "previous_response_not_found" if field else "not_found"
            raise RequestError(what, field=field, status=404, code=code)
        self._stored.move_to_end(response_id)
        return found

    def items(self, response_id: str, tenant: str, field: str = "") -> list[Json]:
        """The conversation. Raises RequestError, as `get` does."""
        found = self.get(response_id, tenant, field)
        items: list[Json] = msgspec.json.decode(found.input)
        return [*items, *msgspec.json.decode(found.output)]

    def drop(self, response_id: str, tenant: str) -> None:
        """Raises RequestError, as `get` does."""
        self._nbytes -= self.get(response_id, tenant).nbytes
        del self._stored[response_id]


NO_STORE = ResponseStore(0)
