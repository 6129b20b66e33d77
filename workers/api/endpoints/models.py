"""GET /v1/models, which scripts poll to learn that the server has started, and /v1/models/NAME."""

from __future__ import annotations

from pipeline.wire.errors import RequestError
from workers.api.endpoints.base import Inquiry, Json
from workers.api.request_fields import unknown_model


class Models(Inquiry):
    path = "/v1/models"

    def render(self, **places: str) -> Json:
        return {"object": "list", "data": [self._card(name) for name in self.model.names]}

    def _card(self, name: str) -> Json:
        """OpenAI's fields, and those of vLLM by which clients set their limits."""
        return {
            "id": name, "object": "model", "created": self.model.created, "owned_by": "local",
            "root": self.model.name, "parent": None, "max_model_len": self.model.max_model_len,
        }  # fmt: skip


class OneModel(Models):
    path = "/v1/models/{name:.+}"

    def render(self, **places: str) -> Json:
        name = places["name"]
        if name not in self.model.names:
            raise RequestError.from_info(unknown_model(name, self.model.names))
        return self._card(name)


ROUTES = (Models, OneModel)
