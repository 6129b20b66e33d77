"""GET /v1/models, which scripts poll to learn that the server has started, and /v1/models/NAME."""

from __future__ import annotations

from pipeline.wire.errors import RequestError
from workers.api.description.answers import ModelCard, ModelList
from workers.api.endpoints.base import Inquiry, Json, ServedModel
from workers.api.request_fields import unknown_model


class Models(Inquiry):
    path, answer = "/v1/models", ModelList

    def render(self, **places: str) -> Json:
        return {"object": "list", "data": [_card(name, self.model) for name in self.model.every_name]}


class OneModel(Inquiry):
    path, answer = "/v1/models/{name:.+}", ModelCard

    def render(self, **places: str) -> Json:
        name = places["name"]
        if name not in self.model.every_name:
            raise RequestError.from_info(unknown_model(name, self.model.every_name))
        return _card(name, self.model)


def _card(name: str, model: ServedModel) -> Json:
    """OpenAI's fields, and those of vLLM by which clients set their limits and know adapters."""
    is_adapter = name in model.adapters
    return {
        "id": name, "object": "model", "created": model.created, "owned_by": "local",
        "root": name if is_adapter else model.name, "parent": model.name if is_adapter else None,
        "max_model_len": model.max_model_len,
    }  # fmt: skip


ROUTES = (Models, OneModel)
