"""Texts and names that would like to be more than texts: they are shown, and do nothing."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.page.answers import answer_with
from tests.page.conftest import add_files, answer, answer_text, ask, wait_until

LONGEST_GAP_MS = 1500  # that the page may not react; measured below 300 on a quiet machine
ATTACKS = """
<img src=x onerror="window.hit=1"> <script>window.hit=1</script> <svg onload="window.hit=1"></svg>

<iframe src="javascript:window.parent.hit=1"></iframe>

[one](javascript:window.hit=1) [two](JaVaScRiPt:window.hit=1)
[three](data:text/html,<script>window.hit=1</script>) [four](vbscript:x)
[five](&#106;avascript:window.hit=1) <javascript:window.hit=1>
[six](/v1/models) [seven](//evil.example/a)

![picture](http://evil.example/a.png) ![two](javascript:window.hit=1)
[![three](http://evil.example/b.png)](http://evil.example/c)

[ref]: javascript:window.hit=1
[a reference][ref]

<style>body{display:none}</style><base href="http://evil.example/"><form action="http://evil.example/"><input></form>

```html
<img src=x onerror="window.hit=1">
```

```<img src=x onerror=window.hit=1>
code
```

| <img src=x onerror="window.hit=1"> | b |
| --- | --- |
| <a href="javascript:window.hit=1">c</a> | `<script>window.hit=1</script>` |

`__proto__` [constructor](constructor) **<b onclick="window.hit=1">bold</b>**
"""
NAME = '"><img src=x onerror="window.hit=1">.png'


def safe(page: Any) -> None:
    """Nothing has run, and nothing is there that could."""
    assert page.evaluate("window.hit") is None
    found = page.evaluate(
        """() => [...document.querySelectorAll("main *")].filter((element) =>
            ["SCRIPT", "IFRAME", "OBJECT", "EMBED", "STYLE", "BASE"].includes(element.tagName)
            || [...element.attributes].some((one) => one.name.startsWith("on"))
            || /^\\s*(javascript|vbscript|data):/i.test(element.getAttribute("href") ?? "")
            || /^(https?:)?\\/\\//i.test(element.getAttribute("src") ?? "")
        ).map((element) => element.outerHTML.slice(0, 200))"""
    )
    assert found == []


def test_a_hostile_answer_does_nothing(page: Any) -> None:
    answer_with(page, ATTACKS, thoughts=ATTACKS, piece=7)
    ask(page, ATTACKS)
    turn = answer(page)
    turn.locator("summary").click()
    page.evaluate("new Promise((resolve) => setTimeout(resolve, 300))")
    safe(page)
    text = turn.inner_text()
    assert '<img src=x onerror="window.hit=1">' in text, "it is shown as it was written"
    links = page.evaluate("[...document.querySelectorAll('.answer > .markdown a')].map((link) => link.href)")
    assert sorted(set(links)) == [
        "http://evil.example/a.png",
        "http://evil.example/b.png",
        "http://evil.example/c",
    ], "pictures of elsewhere are links, and other links lead nowhere"
    relations = page.evaluate(
        """[...document.querySelectorAll('.answer a')]
            .every((link) => link.rel.includes('noopener') && link.target === '_blank')"""
    )
    assert relations
    page.reload()
    page.locator(".answer").wait_for()
    safe(page)


def test_a_hostile_name_of_a_file_does_nothing(page: Any) -> None:
    page.watched.allowed = ("status of 400",)
    add_files(page, {"name": NAME, "mimeType": "image/png", "buffer": b"no picture"})
    assert NAME in page.locator(".composer figcaption").inner_text()
    page.get_by_role("button", name=f"Remove {NAME}").wait_for()
    ask(page, NAME)
    assert answer(page).locator(".error").inner_text()
    safe(page)
    page.locator(".open-sidebar, .chat-name").last.wait_for(state="attached")
    assert page.locator(".chat-name").first.inner_text() == NAME[:60]
    page.get_by_role("button", name="Rename").first.click()
    page.keyboard.press("Escape")
    safe(page)


def test_a_hostile_error_does_nothing(page: Any) -> None:
    page.watched.allowed = ("status of 500",)
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            status=500, json={"error": {"message": ATTACKS, "param": "<script>", "code": None}}
        ),
    )
    ask(page, "Hello")
    assert "window.hit" in answer(page).locator(".error").inner_text()
    safe(page)


LINE = "word *emphasis* `code` [link](http://a.example) <b>tag</b> 中文\n"
HUGE = {
    "paragraphs": (LINE * 3 + "\n") * (1_000_000 // (3 * len(LINE))),
    "one paragraph": LINE * (1_000_000 // len(LINE)),
    "no line break": "x" * 1_000_000,
    "a table": "| a | b | c |\n| - | - | - |\n" + "| 1 | 2 | 3 |\n" * 70_000,
    "a wide table": "|" + "a|" * 20_000 + "\n|" + "-|" * 20_000 + "\n",
    "nested": ">" * 50_000 + "\n" + "- " * 20_000 + "\n" + "[" * 50_000 + "*" * 50_000 + "`" * 50_001,
    "emphasis": "*a_ " * 100_000,
    "emphasis without a space": "*a_" * 6_500,
    "JSON, deep": "[" * 4_000 + "]" * 4_000,
    "JSON, too deep": "[" * 20_000 + "]" * 20_000,
    "JSON, long": "[" + ",".join(["1"] * 500_000) + "]",
    "code": "```python\n" + "print('a')\n" * 90_000,
    "code that is slow to colour": "```markdown\n" + "[a](" * 4_500 + "\n```\n",
    "short lines that are slow to colour": "```cpp\n" + ("a_" * 140 + "\n") * 35 + "```\n",
    "links": "[a](b " * 100_000,
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_huge_answer_does_not_freeze_the_page(page: Any, kind: str, record_property: Any) -> None:
    text = HUGE[kind]
    answer_with(page, text, piece=4000)
    page.evaluate(
        """() => {
            window.longest = 0;
            let last = performance.now();
            setInterval(() => {
                window.longest = Math.max(window.longest, performance.now() - last);
                last = performance.now();
            }, 10);
        }"""
    )
    begun = time.monotonic()
    ask(page, "Tell me everything.")
    answer(page)
    page.evaluate("new Promise((resolve) => setTimeout(resolve, 300))")  # colours come a little later
    took, longest = time.monotonic() - begun, page.evaluate("window.longest")
    record_property(f"a huge answer, {kind}", f"{took:.1f} s, longest pause {longest:.0f} ms")
    assert longest < LONGEST_GAP_MS
    shown = page.evaluate("document.querySelector('.answer > .markdown').textContent.length")
    assert shown > 0.4 * len(text), "nothing is left out"
    page.locator(".new-chat").click()
    wait_until(lambda: page.locator(".answer").count() == 0)


def test_markdown_is_shown(page: Any) -> None:
    answer_with(
        page,
        "# Title\n\nSome **bold** &amp; `code`.\n\n1. one\n2. two\n   - three\n\n> quote\n\n- [x] done\n\n"
        "| a | b |\n| --- | ---: |\n| 1 | 2 |\n\n```python\ndef f():\n    return 1\n```\n\n[link](https://a.example/)",
        piece=3,
    )
    ask(page, "Show me.")
    shown = answer(page).locator("> .markdown")
    assert "Some bold & code." in answer_text(page)
    for selector in ("h2", "strong", "ol > li", "ul", "blockquote", "td.align-right", "pre code", "a[href]"):
        assert shown.locator(selector).count() > 0, selector
    shown.locator(".hl-keyword").first.wait_for()
    assert shown.locator("pre code").inner_text() == "def f():\n    return 1"
