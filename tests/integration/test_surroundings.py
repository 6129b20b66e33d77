"""What surrounds the endpoints, with a server as the launcher starts it: https, names, the access log."""

from __future__ import annotations

import json
import ssl
import urllib.request
from pathlib import Path

from tests.integration.test_http import LIMITS
from tests.servers import Server
from tests.workers.api.test_tls import PEM


def test_https_with_several_names_and_an_access_log(tmp_path: Path) -> None:
    pem = tmp_path / "both.pem"
    pem.write_text(PEM)
    options = ("--ssl-certfile", str(pem), "--served-model-name", "a", "b", "--access-log", "json")
    with Server(*options, *LIMITS) as server:
        assert server.url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=str(pem))
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "model": "b"}
        request = urllib.request.Request(
            f"{server.url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "X-Request-Id": "r1"},
        )
        with urllib.request.urlopen(request, timeout=60, context=context) as response:
            answer = json.load(response)
            assert response.headers["X-Request-Id"] == "r1"
        assert (answer["model"], answer["usage"]["completion_tokens"]) == ("a", 2)
        with urllib.request.urlopen(f"{server.url}/models", timeout=60, context=context) as response:
            assert [card["id"] for card in json.load(response)["data"]] == ["a", "b"]
    chat, models = (json.loads(line) for line in server.lines if line.startswith('{"time"'))
    assert (chat["request_id"], chat["output_tokens"], chat["completion_id"]) == ("r1", 2, answer["id"])
    assert (models["path"], models["status"]) == ("/models", 200)
