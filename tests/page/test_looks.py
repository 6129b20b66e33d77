"""For eyes, ears and fingers: accessibility, colours, widths, the keyboard, languages."""

from __future__ import annotations

from typing import Any

import pytest

from tests.page.answers import answer_with
from tests.page.conftest import answer, answer_text, ask, wait_until
from tests.servers import Server

PHONE = {"width": 390, "height": 844}
MARKDOWN = (
    "# A title\n\nText with a [link](https://a.example/).\n\n| a | b |\n| - | - |\n| 1 | 2 |\n\n"
    "```python\n# why\nx = 'text' + str(1)\n```\n"
)


def assert_accessible(page: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def assert_fits(page: Any) -> None:
    """Nothing is cut off at the right."""
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    wide = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select, h1, h2, img")]
            .filter((element) => element.checkVisibility({visibilityProperty: true}))
            .filter((element) => !element.closest(".visually-hidden, .sidebar, pre, .table"))
            .filter((element) => element.getBoundingClientRect().right > innerWidth + 1)
            .map((element) => element.outerHTML.slice(0, 120))"""
    )
    assert wide == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(page: Any, theme: str) -> None:
    page.emulate_media(color_scheme=theme)
    assert_accessible(page)
    answer_with(page, MARKDOWN, thoughts="Let me think.")
    ask(page, "Show me.")
    answer(page).locator(".hl-string").first.wait_for()
    page.locator(".answer summary").click()
    assert_accessible(page)
    page.locator(".open-panel").click()
    for group in page.locator(".panel summary").all():
        group.click()
    assert_accessible(page)
    page.get_by_role("button", name="Delete").first.click()
    assert_accessible(page)


def test_axe_finds_nothing_on_a_phone(page: Any) -> None:
    page.set_viewport_size(PHONE)
    assert_accessible(page)
    page.locator(".open-sidebar").click()
    assert_accessible(page)


def brightness(page: Any) -> float:
    """Of the ground, from 0 to 255."""
    colour = page.evaluate(
        """() => {
            const canvas = document.createElement("canvas").getContext("2d");
            canvas.fillStyle = getComputedStyle(document.body).backgroundColor;
            canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data];
        }"""
    )
    return float(sum(colour[:3]) / 3)


def test_dark_by_the_system_and_by_choice(page: Any) -> None:
    page.emulate_media(color_scheme="light")
    assert brightness(page) > 200
    page.emulate_media(color_scheme="dark")
    assert brightness(page) < 60
    page.locator("#theme").click()
    assert brightness(page) > 200, "light is the user's choice"
    page.reload()
    page.locator("#question").wait_for()
    assert brightness(page) > 200, "and stays it"
    page.locator("#theme").click()
    page.emulate_media(color_scheme="light")
    assert brightness(page) < 60
    page.locator("#theme").click()
    assert brightness(page) > 200


def test_at_the_width_of_a_phone(page: Any) -> None:
    page.set_viewport_size(PHONE)
    assert_fits(page)
    page.locator(".sample").first.get_by_role("button").first.click()
    assert "red star" in answer_text(page).lower()
    assert_fits(page)
    page.locator(".open-sidebar").click()
    page.locator(".new-chat").click()
    answer_with(page, MARKDOWN + "\n\n" + "long" * 200 + "\n\n| " + "wide column | " * 12 + "\n|" + "-|" * 12)
    ask(page, "x" * 300)
    answer(page)
    assert_fits(page)
    page.locator(".open-panel").click()
    assert_fits(page)
    page.keyboard.press("Escape")
    wait_until(lambda: page.locator(".panel").is_hidden())


def test_all_by_the_keyboard(page: Any) -> None:
    focused = "document.activeElement"
    for _ in range(60):
        page.keyboard.press("Shift+Tab")
        if page.evaluate(f"{focused}.className") == "skip-link":
            break
    assert page.evaluate(f"{focused}.className") == "skip-link", "it comes before all others"
    page.keyboard.press("Enter")
    assert page.evaluate(f"{focused}.id") == "content"
    seen: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(f"{focused}.className + ' ' + {focused}.id + ' ' + {focused}.textContent"))
        outline = page.evaluate(
            f"getComputedStyle({focused}).outlineStyle !== 'none' || {focused}.closest('.composer') !== null"
        )
        assert outline, f"{seen[-1]} does not show that it has the focus"
        if "What color is the star?" in seen[-1]:
            break
    page.keyboard.press("Enter")
    assert "red" in answer_text(page).lower()
    page.locator("#question").focus()
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.locator("#question").input_value() == "One\ntwo"
    page.keyboard.press("Enter")
    answer(page, 1)
    assert page.locator(".question").nth(1).inner_text().strip() == "One\ntwo"
    assert page.evaluate(f"{focused}.id") == "question", "the next question can be written at once"


def test_a_screen_reader_hears_whole_answers(page: Any) -> None:
    region = page.locator("#announcements")
    assert (region.get_attribute("role"), region.get_attribute("aria-live")) == ("status", "polite")
    answer_with(page, "One two three.", piece=1)
    page.evaluate(
        """() => {
            window.heard = [];
            const region = document.getElementById("announcements");
            const hear = () => window.heard.push(region.textContent);
            new MutationObserver(hear).observe(region, {childList: true});
        }"""
    )
    ask(page, "Hello")
    answer(page)
    wait_until(lambda: page.evaluate("window.heard").count("One two three.") == 1)
    assert page.evaluate("window.heard") == ["The model answers", "One two three."]
    assert page.locator(".thread [aria-live]").count() == 0, "no token is read out by itself"
    for role in ("banner", "main", "navigation", "status"):
        assert page.get_by_role(role).count() >= 1, role


def test_chinese_by_the_browser_and_by_choice(browser: Any, server: Server) -> None:
    context = browser.new_context(locale="zh-CN")
    page = context.new_page()
    page.goto(f"{server.url}/")
    page.locator(".welcome h2", has_text="就图片或视频提问").wait_for()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    page.locator(".sample").nth(1).get_by_role("button").first.click()
    assert "三" in answer_text(page)
    page.locator("#language").select_option("en")
    page.locator(".new-chat", has_text="New chat").wait_for()
    assert "三" in answer_text(page), "the chat is still there"
    assert page.evaluate("document.documentElement.lang") == "en"
    context.close()
