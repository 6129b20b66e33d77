"""GET /v1/models. Scripts poll it to learn that the server has started."""

from __future__ import annotations

from workers.api.endpoints.base import Inquiry, Json


class Models(Inquiry):
    path = "/v1/models"

    def render(self) -> Json:
        card = {"object": "model", "created": self.model.created, "owned_by": "local"}
        return {"object": "list", "data": [{"id": name, **card} for name in self.model.names]}


ROUTES = (Models,)
