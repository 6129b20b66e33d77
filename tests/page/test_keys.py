"""A server with keys: the page asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.conftest import LIMITS
from tests.page.conftest import Watched, answer_text
from tests.servers import Server

KEY = "correct-horse"


@pytest.fixture(scope="module")
def server(browser: Any) -> Iterator[Server]:
    with Server("--dtype", "float32", "--api-key", KEY, *LIMITS) as running:
        yield running


def test_a_key_is_asked_for_and_kept_as_the_user_wants(context: Any, server: Server) -> None:
    page = context.new_page()
    watched = Watched(page, server.url)
    watched.allowed = ("status of 401",)
    page.goto(f"{server.url}/")
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("API key").fill("wrong")
    dialog.get_by_label("API key").press("Enter")
    dialog.get_by_text("The server does not know this key.").wait_for()
    dialog.get_by_label("API key").fill(KEY)
    dialog.get_by_label("API key").press("Enter")
    page.locator("#model", has_text="embedded-shapes").wait_for()
    page.locator(".sample").first.get_by_role("button").first.click()
    assert "red star" in answer_text(page).lower()
    page.reload()
    page.locator("#model", has_text="embedded-shapes").wait_for()
    assert page.evaluate("[sessionStorage.length, Object.values(localStorage).join()]") == [1, ""]

    other = context.new_page()
    other.goto(f"{server.url}/")
    dialog = other.get_by_role("dialog")
    dialog.get_by_label("API key").fill(KEY)
    dialog.get_by_label("Remember it in this browser").check()
    dialog.get_by_role("button", name="Use this key").click()
    other.locator("#model", has_text="embedded-shapes").wait_for()
    third = context.new_page()
    third.goto(f"{server.url}/")
    third.locator("#model", has_text="embedded-shapes").wait_for()
    assert third.get_by_role("dialog").count() == 0
    assert watched.wrong == []
