"""GET /v1/models. Scripts poll it to learn that the server has started."""

from __future__ import annotations

from workers.api.endpoints.base import Inquiry, Json


class Models(Inquiry):
    path = "/v1/models"

    def render(self) -> Json:
        model = self.model
        card = {"id": model.name, "object": "model", "created": model.created, "owned_by": "local"}
        return {"object": "list", "data": [card]}


ROUTES = (Models,)
