"""The view of the lanes in a browser, with a real server: what moves, what a kill does, who can use it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.servers import Server
from tools.processes import workers_of

CHROMIUM = "/usr/bin/chromium"
OPTIONS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
)  # fmt: skip
PATIENCE_S = 90
EVENTS = "/lanes/events"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=list(OPTIONS))
        yield running
        running.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("--admin-key", "secret", "--max-model-len", "4096") as running:
        yield running
        running.children = workers_of(running.process.pid)


class Seen:
    """What a page has asked for, and what went wrong there."""

    def __init__(self, page: Page) -> None:
        self.hosts: set[str] = set()
        self.num_looks = 0  # requests for the events
        self.num_left = 0  # of them that the page has ended
        self.errors: list[str] = []
        page.on("request", self._on_request)
        page.on("requestfailed", self._on_end)
        page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith(("data:", "blob:")):
            self.hosts.add(request.url.split("/")[2])
        self.num_looks += request.url.endswith(EVENTS)

    def _on_end(self, request: Any) -> None:
        self.num_left += request.url.endswith(EVENTS)


@pytest.fixture
def seen_page(browser: Browser, server: Server) -> Iterator[tuple[Page, Seen]]:
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(PATIENCE_S * 1000)
    expect.set_options(timeout=PATIENCE_S * 1000)
    seen = Seen(page)
    page.goto(f"{server.url}/#lanes")
    expect(page.locator(".lanes-names li")).to_have_count(4)
    yield page, seen
    page.close()
    assert seen.hosts == {server.url.split("/")[2]}, "nothing leaves for another host"
    unexpected = [error for error in seen.errors if "401" not in error]  # of the test with a wrong key
    assert unexpected == []


@pytest.fixture
def page(seen_page: tuple[Page, Seen]) -> Page:
    return seen_page[0]


def until(page: Page, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        page.wait_for_timeout(100)


def drawn(page: Page) -> str:
    return str(page.evaluate("document.querySelector('.lanes-frame canvas').toDataURL()"))


def num_tokens(page: Page) -> int:
    """That the streams have yielded so far, as the page counts them."""
    cells = page.locator(".lanes-figures tbody tr td:last-child").all_inner_texts()
    return sum(int(text.replace(",", "")) for text in cells)


def kill(page: Page, worker: str, key: str) -> None:
    page.get_by_role("button", name=f"Kill {worker}").click()
    page.get_by_label("Admin key").fill(key)
    page.get_by_role("button", name="Kill it").click()


def violations(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {node['html']}" for one in found for node in one["nodes"]]


def test_pictures_are_encoded_while_tokens_flow_and_a_kill_is_survived(page: Page) -> None:
    start = page.get_by_role("button", name="Send 4 streams and 20 pictures")
    start.click()
    expect(page.locator("#lanes-demo")).to_have_text("Stop")
    until(page, lambda: num_tokens(page) > 40)
    before = drawn(page)
    page.wait_for_timeout(1000)
    assert drawn(page) != before, "the lanes move"

    page.locator("summary").click()
    words = page.locator(".lanes-words tbody")
    expect(words.locator("tr", has_text="vit.0")).to_contain_text("encode pictures")
    expect(words.locator("tr", has_text="llm.0")).to_contain_text("decode steps")
    expect(words.locator("tr", has_text="preprocess.0")).to_contain_text("decode a picture")
    expect(page.locator(".lanes-figures .phase-pictures")).to_be_visible()
    expect(page.locator(".lanes-figures .phase-alone")).to_be_visible()

    for worker in ("vit.0", "llm.0"):
        kill(page, worker, "secret")
        lane = page.locator(".lanes-names li", has_text=worker)
        expect(lane).to_contain_text("serves, № 2")
        num_before = num_tokens(page)
        until(page, lambda num_before=num_before: num_tokens(page) > num_before + 20)
    assert page.locator(".toast").count() == 0, "no stream has broken"
    expect(page.locator(".lanes-status")).to_contain_text(re.compile(r"[1-9]\d* of 20 pictures are answered"))
    assert violations(page) == []
    page.locator("#lanes-demo").click()
    expect(start).to_be_visible()
    expect(page.locator(".lanes-status")).to_have_text("Stopped.")


def test_a_wrong_admin_key_is_said_in_words_and_nothing_is_killed(page: Page) -> None:
    kill(page, "preprocess.0", "wrong")
    expect(page.locator(".toast")).to_contain_text("the admin key is needed")
    expect(page.locator(".lanes-names li", has_text="preprocess.0")).to_have_text(re.compile("serves$"))


def test_the_keyboard_goes_from_one_piece_of_work_to_the_next(page: Page, server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 60, "ignore_eos": True}
    page.evaluate(
        "body => fetch('/v1/chat/completions', {method: 'POST', body, "
        "headers: {'Content-Type': 'application/json'}}).then((answer) => answer.text())",
        json.dumps(body),
    )
    page.wait_for_timeout(1500)
    tip = page.locator(".lanes-tip")
    page.locator(".lanes-frame").focus()
    page.keyboard.press("ArrowDown")
    expect(tip).to_have_text(re.compile(r"^llm\.0: decode steps, .* ms, .*your request chatcmpl"))
    last = tip.inner_text()
    held = drawn(page)
    page.keyboard.press("ArrowLeft")
    assert tip.inner_text() != last
    page.keyboard.press("ArrowRight")
    assert tip.inner_text() == last
    assert drawn(page) == held, "the picture is held"
    page.keyboard.press("ArrowDown")
    expect(tip).to_contain_text("preprocess.0: tokenise")
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    assert violations(page) == []


def test_a_pointer_above_work_is_told_what_it_is(page: Page) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100, "ignore_eos": True}
    page.evaluate(
        "body => fetch('/v1/chat/completions', {method: 'POST', body, "
        "headers: {'Content-Type': 'application/json'}}).then((answer) => answer.text())",
        json.dumps(body),
    )
    page.wait_for_timeout(1500)
    page.get_by_role("button", name="Hold the picture").click()
    box = page.locator(".lanes-frame canvas").bounding_box()
    assert box is not None
    tip = page.locator(".lanes-tip")
    x = box["x"] + box["width"]
    while not tip.is_visible():  # from now back to the last step
        x -= 4
        assert x > box["x"], "there is work"
        page.mouse.move(x, box["y"] + 20)
    expect(tip).to_contain_text("llm.0: decode steps")
    page.mouse.move(box["x"] + 2, box["y"] - 40)
    expect(tip).to_be_hidden()


def test_nothing_comes_while_nobody_looks(seen_page: tuple[Page, Seen]) -> None:
    page, seen = seen_page
    until(page, lambda: seen.num_looks == 1)
    hide = (
        "isHidden => { Object.defineProperty(document, 'hidden', {value: isHidden, configurable: true});"
        " document.dispatchEvent(new Event('visibilitychange')); }"
    )
    page.evaluate(hide, True)
    until(page, lambda: seen.num_left == 1)
    page.wait_for_timeout(1500)
    assert seen.num_looks == 1
    page.evaluate(hide, False)
    until(page, lambda: seen.num_looks == 2)
    page.goto(page.url.replace("#lanes", "#chat"))
    until(page, lambda: seen.num_left == 2)


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 390), ("dark", 390)]
)
def test_it_can_be_used_in_every_form(page: Page, scheme: Any, width: int) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.locator("summary").click()
    page.wait_for_timeout(1200)
    assert page.evaluate("document.querySelector('.view').scrollWidth <= innerWidth"), "nothing stands out"
    assert violations(page) == []


def test_it_speaks_chinese(page: Page) -> None:
    page.get_by_label("Language").select_option("zh")
    expect(page.locator("h1")).to_have_text("实时查看每个进程在做什么")
    assert violations(page) == []
    page.get_by_label("语言").select_option("en")
    keys = page.evaluate(
        "import('/page/lanes/strings.js').then(({strings: {en, zh}}) => [Object.keys(en), Object.keys(zh)])"
    )
    assert keys[0] == keys[1]
