"""The view of the lanes in a browser, with a real server: what moves, what a kill does, who can use it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.page.conftest import Watched, wait_until
from tests.servers import Server
from tools.processes import workers_of

PATIENCE_S = 60
EVENTS = "/lanes/events"
DRAWN_MS = 1500  # after which a held picture has been drawn again


@pytest.fixture(scope="module")
def server(playwright_api: Any) -> Iterator[Server]:
    with Server("--admin-key", "secret", "--max-model-len", "4096") as running:
        yield running
        running.children = workers_of(running.process.pid)


class Looks:
    """How often a page has asked for the events, and how often it has left."""

    def __init__(self, page: Any) -> None:
        self.num_begun = self.num_left = 0
        page.on("request", self._on_request)
        page.on("requestfailed", self._on_end)

    def _on_request(self, request: Any) -> None:
        self.num_begun += request.url.endswith(EVENTS)

    def _on_end(self, request: Any) -> None:
        self.num_left += request.url.endswith(EVENTS)


@pytest.fixture
def page(context: Any, server: Server) -> Iterator[Any]:
    """The lanes, open. At the end of the test, nothing may be wrong with the page."""
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE_S * 1000)
    opened.looks = Looks(opened)
    watched = opened.watched = Watched(opened, server.url)
    opened.goto(f"{server.url}/#lanes")
    until(opened, lambda: opened.locator(".lanes-names li").count() == 4)
    yield opened
    assert watched.wrong == []
    opened.close()


def until(page: Any, condition: Callable[[], bool]) -> None:
    wait_until(lambda: page.wait_for_timeout(50) or condition(), PATIENCE_S)


def expect_text(place: Any, text: str) -> None:
    """It appears there, perhaps later."""
    until(place.page, lambda: re.search(text, place.inner_text()) is not None)


def drawn(page: Any) -> str:
    return str(page.evaluate("document.querySelector('.lanes-frame canvas').toDataURL()"))


def num_tokens(page: Any) -> int:
    """That the streams have yielded so far, as the page counts them."""
    cells = page.locator(".lanes-figures tbody tr td:last-child").all_inner_texts()
    return sum(int(text.replace(",", "")) for text in cells)


def kill(page: Any, worker: str, key: str) -> None:
    page.get_by_role("button", name=f"Kill {worker}").click()
    page.get_by_label("Admin key").fill(key)
    page.get_by_role("button", name="Kill it").click()


def ask(page: Any, num_tokens: int) -> None:
    """Not through the page's views: one answer without pictures, until it is over."""
    body = {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": num_tokens,
        "ignore_eos": True,
    }
    page.evaluate(
        "body => fetch('/v1/chat/completions', {method: 'POST', body, "
        "headers: {'Content-Type': 'application/json'}}).then((answer) => answer.text())",
        json.dumps(body),
    )
    page.wait_for_timeout(1500)  # until it has been told


def violations(page: Any) -> list[str]:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    found = axe.Axe().run(page).response["violations"]
    return [f"{one['id']}: {node['html']}" for one in found for node in one["nodes"]]


def test_pictures_are_encoded_while_tokens_flow_and_a_kill_is_survived(page: Any) -> None:
    start = page.get_by_role("button", name="Send 4 streams and 20 pictures")
    start.click()
    expect_text(page.locator("#lanes-demo"), "Stop")
    until(page, lambda: num_tokens(page) > 40)
    before = drawn(page)
    page.wait_for_timeout(1000)
    assert drawn(page) != before, "the lanes move"

    page.locator("summary").click()
    words = page.locator(".lanes-words tbody")
    expect_text(words.locator("tr", has_text="vit.0"), "encode pictures")
    expect_text(words.locator("tr", has_text="llm.0"), "decode steps")
    expect_text(words.locator("tr", has_text="preprocess.0"), "decode a picture")
    page.locator(".lanes-figures .phase-pictures").wait_for()
    page.locator(".lanes-figures .phase-alone").wait_for()

    for worker in ("vit.0", "llm.0"):
        kill(page, worker, "secret")
        lane = page.locator(".lanes-names li", has_text=worker)
        expect_text(lane, "serves, replaced 1×")
        num_before = num_tokens(page)
        until(page, lambda num_before=num_before: num_tokens(page) > num_before + 20)
    assert page.locator(".toast").count() == 0, "no stream has broken"
    expect_text(page.locator(".lanes-status"), r"[1-9]\d* of 20 pictures are answered")
    assert violations(page) == []
    page.locator("#lanes-demo").click()
    start.wait_for()
    expect_text(page.locator(".lanes-status"), "Stopped.")


def test_a_wrong_admin_key_is_said_in_words_and_nothing_is_killed(page: Any) -> None:
    page.watched.allowed = ("401",)
    kill(page, "preprocess.0", "wrong")
    expect_text(page.locator(".toast"), "the admin key is needed")
    expect_text(page.locator(".lanes-names li", has_text="preprocess.0"), "serves$")


def test_the_keyboard_goes_from_one_piece_of_work_to_the_next(page: Any) -> None:
    ask(page, 60)
    tip = page.locator(".lanes-tip")
    page.locator(".lanes-frame").focus()
    page.keyboard.press("ArrowDown")
    expect_text(tip, r"^llm\.0: decode steps, .* ms, .*your request chatcmpl")
    last = tip.inner_text()
    page.wait_for_timeout(DRAWN_MS)
    held = drawn(page)
    page.keyboard.press("ArrowLeft")
    assert tip.inner_text() != last
    page.keyboard.press("ArrowRight")
    assert tip.inner_text() == last
    page.wait_for_timeout(DRAWN_MS)
    assert drawn(page) == held, "the picture is held"
    page.keyboard.press("ArrowDown")
    expect_text(tip, "preprocess.0: tokenise")
    page.keyboard.press("Escape")
    tip.wait_for(state="hidden")
    assert violations(page) == []


def test_a_pointer_above_work_is_told_what_it_is(page: Any) -> None:
    ask(page, 100)
    page.get_by_role("button", name="Pause").click()
    box = page.locator(".lanes-frame canvas").bounding_box()
    assert box is not None
    tip = page.locator(".lanes-tip")
    x = box["x"] + box["width"]
    while not tip.is_visible():  # from now back to the last step
        x -= 4
        assert x > box["x"], "there is work"
        page.mouse.move(x, box["y"] + 20)
    expect_text(tip, "llm.0: decode steps")
    page.mouse.move(box["x"] + 2, box["y"] - 40)
    tip.wait_for(state="hidden")


def test_nothing_comes_while_nobody_looks(page: Any) -> None:
    looks = page.looks
    until(page, lambda: looks.num_begun == 1)
    hide = (
        "isHidden => { Object.defineProperty(document, 'hidden', {value: isHidden, configurable: true});"
        " document.dispatchEvent(new Event('visibilitychange')); }"
    )
    page.evaluate(hide, True)
    until(page, lambda: looks.num_left == 1)
    page.wait_for_timeout(1500)
    assert looks.num_begun == 1
    page.evaluate(hide, False)
    until(page, lambda: looks.num_begun == 2)
    page.goto(page.url.replace("#lanes", "#chat"))
    until(page, lambda: looks.num_left == 2)


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 390), ("dark", 390)]
)
def test_it_can_be_used_in_every_form(page: Any, scheme: Any, width: int) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.locator("summary").click()
    page.wait_for_timeout(1200)
    assert page.evaluate("document.querySelector('.view').scrollWidth <= innerWidth"), "nothing stands out"
    assert violations(page) == []


def test_it_speaks_chinese(page: Any) -> None:
    page.get_by_label("Language").select_option("zh")
    expect_text(page.locator("h1"), "实时查看每个进程在做什么")
    assert violations(page) == []
    page.get_by_label("语言").select_option("en")
    keys = page.evaluate(
        "import('/page/lanes/strings.js').then(({strings: {en, zh}}) => [Object.keys(en), Object.keys(zh)])"
    )
    assert keys[0] == keys[1]
