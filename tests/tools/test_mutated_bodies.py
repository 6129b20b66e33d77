"""How the answers to mutated requests are judged, against a server that gives answers of every kind."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tools.answers import Answer, violation, wrong_answer
from tools.mutated_bodies import QUESTION, Connection, Found, Sender, growth, replay, table
from tools.mutations import Mutated, make_media, mutated_request
from tools.valid_requests import COUNT, MESSAGES, RESPONSES

CHANGED = Mutated(b"", True, ("retype",))
UNFRAMED = CHANGED._replace(is_framed=False)
VALID = CHANGED._replace(what=())
ERROR = json.dumps(
    {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": None}}
).encode()
EVENT = b'data: {"object": "chat.completion.chunk", "choices": []}\n\n'
DONE = b"data: [DONE]\n\n"
WHOLE = b'{"choices": [{}]}'


def answered(status: int, body: bytes, is_stream: bool = False, lost: str = "") -> Answer:
    return Answer(status, body, is_stream, 0.1, lost)


def failed(status: int) -> bytes:
    code = "service_unavailable" if status == 503 else None
    error = {"message": "no", "type": "server_error", "param": None, "code": code}
    return b"data: " + json.dumps({"error": error}).encode() + b"\n\n"


ANTHROPIC_ERROR = b'{"type": "error", "error": {"type": "invalid_request_error", "message": "no"}}'
CREATED = b'event: response.created\ndata: {"type": "response.created"}\n\n'
COMPLETED = b'event: response.completed\ndata: {"type": "response.completed"}\n\n'
STOPPED = b'event: message_stop\ndata: {"type": "message_stop"}\n\n'
BROKEN = b'event: error\ndata: {"type": "error", "error": {"type": "api_error", "message": "no"}}\n\n'
OVERLOADED = BROKEN.replace(b"api_error", b"overloaded_error")


def sent_to(path: str, *what: str) -> Mutated:
    return Mutated(b"", True, what or ("retype",), path)


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (sent_to(MESSAGES), answered(400, ANTHROPIC_ERROR)),
        (sent_to(MESSAGES, "length"), answered(400, ERROR)),
        (sent_to("", "path"), answered(404, ERROR)),
        (sent_to("", "path"), answered(404, ANTHROPIC_ERROR)),
        (sent_to("", "path"), answered(200, b"")),
        (sent_to(COUNT), answered(200, b'{"input_tokens": 0}')),
        (sent_to(MESSAGES), answered(200, STOPPED, True)),
        (sent_to(MESSAGES), answered(200, OVERLOADED, True)),
        (sent_to(RESPONSES), answered(200, CREATED + COMPLETED, True)),
    ],
)
def test_what_each_route_may_answer(sent: Mutated, answer: Answer) -> None:
    assert violation(sent, answer) == ""


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (sent_to(MESSAGES), answered(400, ERROR)),
        (sent_to(RESPONSES), answered(400, ANTHROPIC_ERROR)),
        (sent_to(MESSAGES), answered(500, ANTHROPIC_ERROR)),
        (sent_to("", "path"), answered(500, ERROR)),
        (sent_to("", "path"), answered(404, b"404: Not Found")),
        (sent_to(COUNT), answered(200, b"{}")),
        (sent_to(RESPONSES), answered(200, b'{"output": []}')),
        (sent_to(RESPONSES), answered(200, CREATED, True)),
        (sent_to(RESPONSES), answered(200, CREATED + DONE, True)),
        (sent_to(RESPONSES), answered(200, b"event: a\n" + CREATED.partition(b"\n")[2] + COMPLETED, True)),
        (sent_to(MESSAGES), answered(200, BROKEN, True)),
        (sent_to(MESSAGES), answered(200, COMPLETED, True)),
    ],
)
def test_what_no_route_may_answer(sent: Mutated, answer: Answer) -> None:
    assert violation(sent, answer)


def test_only_openais_error_object_is_right() -> None:
    assert wrong_answer(200, b"anything") == wrong_answer(400, ERROR) == wrong_answer(503, ERROR) == ""
    assert "500" in wrong_answer(500, ERROR)
    for answer in (b"400: Bad Request", b"[]", b'{"error": "no"}', ERROR.replace(b'"param": null, ', b"")):
        assert "error object" in wrong_answer(400, answer)


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (CHANGED, answered(200, WHOLE)),
        (CHANGED, answered(400, ERROR)),
        (CHANGED, answered(503, ERROR)),
        (VALID, answered(429, ERROR)),
        (CHANGED, answered(200, EVENT + DONE, True)),
        (CHANGED, answered(200, EVENT + failed(503) + DONE, True)),
        (UNFRAMED, answered(0, b"", lost="RemoteDisconnected")),
    ],
)
def test_what_may_be_answered(sent: Mutated, answer: Answer) -> None:
    assert violation(sent, answer) == ""


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (CHANGED, answered(500, ERROR)),
        (CHANGED, answered(400, b"Bad Request")),
        (CHANGED, answered(302, b"")),
        (VALID, answered(400, ERROR)),
        (CHANGED, answered(200, b"{")),
        (CHANGED, answered(200, b"[]")),
        (CHANGED, answered(200, b'{"choices": []}')),
        (CHANGED, answered(200, EVENT, True)),
        (CHANGED, answered(200, b"", True)),
        (CHANGED, answered(200, EVENT + b"data: {\n\n" + DONE, True)),
        (CHANGED, answered(200, b"data: []\n\n" + DONE, True)),
        (CHANGED, answered(200, EVENT + failed(500) + DONE, True)),
        (CHANGED, answered(200, b'data: {"error": {"code": "service_unavailable"}}\n\n' + DONE, True)),
        (CHANGED, answered(0, b"", lost="RemoteDisconnected")),
        (UNFRAMED, answered(200, b"", lost="the answer is cut off")),
        (UNFRAMED, answered(0, b"", lost="TimeoutError: timed out")),
    ],
)
def test_what_may_not_be_answered(sent: Mutated, answer: Answer) -> None:
    assert violation(sent, answer)


def test_growth_is_what_goes_on_after_the_first_quarter() -> None:
    def holdings(*mib: int) -> list[dict[str, tuple[int, int]]]:
        return [{"llm.0": (one << 20, 20)} for one in mib]

    assert growth(holdings(*[200] * 4, *[500] * 12)) == []
    assert growth(holdings(*range(200, 1000, 50))) != []
    assert growth(holdings(100, 900)) == [], "too few to say"
    assert growth([{"api.0": (1 << 20, files)} for files in range(20, 52, 2)]) != []


@contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """The URL of a server that reads a request of 100 bytes at most and answers so, on one connection, and
    then closes it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                for answer in answers:
                    connection.recv(100)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        thread.join()


def test_a_connection_is_kept_and_its_end_is_told() -> None:
    good = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    good += b"3\r\nabc\r\n0\r\n\r\n"
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc"
    with answering(good, b"HTTP/1.1 100 Continue\r\n\r\n" + good, cut) as url:
        connection = Connection(url)
        assert [connection.send(b"x")[:3] for _ in range(2)] == [(200, b"abc", True)] * 2
        assert (lost := connection.send(b"x")).lost == "the answer is cut off"
        assert lost.body == b"abc"
    with answering(b"") as url:
        lost = Connection(url).send(b"x")
        assert lost.status == 0
        assert "RemoteDisconnected" in lost.lost


def test_a_replayed_request_has_its_verdict() -> None:
    head = b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n"
    with answering(head % len(ERROR) + ERROR) as url:
        assert replay(url, b"x").endswith("fine")
    with answering(head % 3 + b"abc") as url:
        assert "NOT FINE" in replay(url, b"x")


def test_the_table_has_every_answer_and_process() -> None:
    found = Found()
    found.seconds["200"] = [(0.1, 3), (0.3, 4), (0.2, 5)]
    found.changes["drop"] = 2
    found.violations.append("1-4 (drop): status 500")
    found.holdings = [{"llm.0": (100 << 20, 20)}, {"llm.0": (120 << 20, 21)}]
    said = table(found)
    assert "| 200 | 3 | 200 ms | 200 ms | 300 ms | 4 |" in said
    assert "| llm.0 | 100 | 100 | 100 | 120 | 20, 21 |" in said
    assert "drop 2" in said
    assert "- 1-4 (drop): status 500" in said


class Forgetful(BaseHTTPRequestHandler):
    """Answers a plain question once, and everything else with a status that is a violation; each look finds
    one more restart."""

    protocol_version = "HTTP/1.1"
    num_asked = 0

    def do_GET(self) -> None:
        self._say(200, f'vlm_worker_restarts_total{{worker="llm.0"}} {Forgetful.num_asked}\n'.encode())

    def do_POST(self) -> None:
        if self.rfile.read(int(self.headers["Content-Length"] or 0)) == QUESTION:
            Forgetful.num_asked += 1
            self._say(200, b'{"choices": [{"message": {"content": "hello %d"}}]}' % Forgetful.num_asked)
        else:
            self._say(500, ERROR)

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Homeless(Sender):
    """Of a server that has no processes."""

    def _holdings(self) -> dict[str, tuple[int, int]]:
        return {}


def test_what_is_wrong_is_found_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = mutated_request(1, 0, make_media())
    monkeypatch.setattr("tools.mutated_bodies.mutated_request", lambda *_: sent)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Forgetful)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        found = Homeless(f"http://127.0.0.1:{server.server_port}/v1", 0, 1, tmp_path).run(20)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert len(found.seconds["500"]) == 20
    assert {path.name for path in tmp_path.iterdir()} == {f"1-{number}.http" for number in range(20)}
    assert (tmp_path / "1-7.http").read_bytes() == sent.request
    assert len(found.violations) == 22
    assert any("'hello 2' instead of 'hello 1'" in words for words in found.violations)
    assert any("restarts {'llm.0': 2} after {'llm.0': 1}" in words for words in found.violations)
