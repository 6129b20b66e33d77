"""A real browser, and a real server with the embedded model, for the tests of the page."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# It asks for nothing on the network by itself, and keeps away from /dev/shm, where servers are looked after.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
TIMEOUT_MS = 20_000


@pytest.fixture(scope="package")
def playwright_api() -> Any:
    """Skips where there is no browser, before a server is started."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    return pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def browser(playwright_api: Any) -> Iterator[Any]:
    """For one module: while it is there, an event loop counts as running, and no test can have its own."""
    with playwright_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture(scope="package")
def server(playwright_api: Any, request: pytest.FixtureRequest) -> Server:
    """That of all tests, which starts where there is a browser."""
    found: Server = request.getfixturevalue("embedded_server")
    return found


class Watched:
    """What a page has done that no page may do."""

    def __init__(self, page: Any, origin: str) -> None:
        self.wrong: list[str] = []
        self._origin = origin
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.wrong.append(f"uncaught: {error}"))
        page.on("dialog", lambda dialog: (self.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", self._on_request)
        page.on("popup", lambda popup: self.wrong.append(f"popup: {popup.url}"))
        self.allowed: tuple[str, ...] = ()  # parts of messages that the test expects

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning") and not any(part in message.text for part in self.allowed):
            self.wrong.append(f"{message.type}: {message.text}")

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith((self._origin, "blob:", "data:")):
            self.wrong.append(f"asks for {request.url}")


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    """Of one test: another has no chats of it."""
    made = browser.new_context(locale="en-US", viewport={"width": 1280, "height": 800})
    made.set_default_timeout(TIMEOUT_MS)
    yield made
    made.close()


@pytest.fixture
def page(context: Any, server: Server) -> Iterator[Any]:
    """The page, open. At the end of the test, nothing may be wrong with it."""
    opened = context.new_page()
    watched = opened.watched = Watched(opened, server.url)
    opened.goto(f"{server.url}/")
    opened.locator("#question").wait_for()
    yield opened
    assert watched.wrong == []


def wait_until(condition: Any, timeout_s: float = 15.0) -> None:
    """`condition` asks the page: its own policy lets no script of ours poll there."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def ask(page: Any, question: str) -> None:
    page.locator("#question").fill(question)
    page.locator("#question").press("Enter")


def answer(page: Any, number: int = -1) -> Any:
    """The text of a whole answer, once its figures (or its error) are there."""
    turn = page.locator(".answer").nth(number)
    turn.locator(".answer-foot > *").first.wait_for()
    return turn


def answer_text(page: Any, number: int = -1) -> str:
    return str(answer(page, number).locator("> .markdown, > .code").inner_text()).strip()


def add_files(page: Any, *files: Path | dict[str, Any]) -> None:
    page.locator("#pick-files").set_input_files(list(files))
    page.locator(".composer .media-place").nth(len(files) - 1).wait_for()
