"""Conversations of OpenAI's Responses API that a later request goes on from.

They live in this process, up to a number of bytes: the oldest are forgotten first, all with the process.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from pipeline.wire.errors import RequestError, shown

STORED_BYTES = 256 << 20  # of all conversations, their pictures included
ENTRY_BYTES = 1024  # of one beside its JSON

Json = dict[str, Any]


class StoredResponse(NamedTuple):
    tenant: str
    input: bytes  # JSON: the items of the conversation before the answer, pictures as data URLs
    output: tuple[bytes, ...]  # JSON of each item of the answer
    response: bytes  # JSON: the answer as the client got it
    item_ids: tuple[str, ...]  # of the answer's items

    @property
    def nbytes(self) -> int:
        num_bytes = self.num_conversation_bytes + len(self.response)
        return ENTRY_BYTES * (1 + len(self.item_ids)) + num_bytes

    @property
    def num_conversation_bytes(self) -> int:
        return len(self.input) + sum(map(len, self.output))


class ResponseStore:
    def __init__(self, max_bytes: int = STORED_BYTES) -> None:
        self._max_bytes, self._nbytes = max_bytes, 0
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()
        self._response_of: dict[str, str] = {}  # the id of an item → that of the answer it is in

    def put(self, response_id: str, tenant: str, items: bytes, output: list[Json], response: Json) -> None:
        """Keeps a conversation, `items` in JSON and the answer's `output`, unless it is too large alone."""
        ids = tuple(item["id"] for item in output)
        made = StoredResponse(
            tenant, items, tuple(map(msgspec.json.encode, output)), msgspec.json.encode(response), ids
        )
        if made.nbytes > self._max_bytes:
            return
        self._stored[response_id] = made
        self._response_of |= dict.fromkeys(ids, response_id)
        self._nbytes += made.nbytes
        while self._nbytes > self._max_bytes:
            self._forget(next(iter(self._stored)))

    def get(self, response_id: str, tenant: str, field: str = "") -> StoredResponse:
        """Raises RequestError (404) for an id that is unknown, or another tenant's."""
        found = self._stored.get(response_id)
        if found is None or found.tenant != tenant:
            what = f"there is no response {shown(response_id)}: it was not stored, or is forgotten"
            code = "previous_response_not_found" if field else "not_found"
            raise RequestError(what, field=field, status=404, code=code)
        self._stored.move_to_end(response_id)
        return found

    def items(
        self, response_id: str, tenant: str, field: str = "", reserve: Callable[[int], None] = lambda _: None
    ) -> list[Json]:
        """The conversation, for which memory is reserved. Raises RequestError, as `get` does."""
        found = self.get(response_id, tenant, field)
        reserve(found.num_conversation_bytes)
        items: list[Json] = msgspec.json.decode(found.input)
        return [*items, *map(msgspec.json.decode, found.output)]

    def item(self, item_id: str, tenant: str, field: str) -> Json:
        """One item of an answer. Raises RequestError (404), naming the field, as `get` does."""
        found = self._stored.get(self._response_of.get(item_id, ""))
        if found is None or found.tenant != tenant:
            what = f"there is no item {shown(item_id)}: it was not stored, or is forgotten"
            raise RequestError(what, field=field, status=404, code="not_found")
        item: Json = msgspec.json.decode(found.output[found.item_ids.index(item_id)])
        return item

    def drop(self, response_id: str, tenant: str) -> None:
        """Raises RequestError, as `get` does."""
        self.get(response_id, tenant)
        self._forget(response_id)

    def _forget(self, response_id: str) -> None:
        gone = self._stored.pop(response_id)
        self._nbytes -= gone.nbytes
        for item_id in gone.item_ids:
            del self._response_of[item_id]


NO_STORE = ResponseStore(0)
