"""Chats in the page: with the embedded model, by a real browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from launcher.checkpoints import EMBEDDED
from tests.page.conftest import add_files, answer, answer_text, ask, wait_until
from tests.pictures import encode, scene
from tests.servers import Server
from tests.videos import encode_video

SAMPLES = EMBEDDED / "samples"
STAR = SAMPLES / "red-star.png"
SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["star", "circle"]}, "color": {"enum": ["red", "blue"]}},
    "required": ["shape", "color"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


def figures(page: Any, number: int = -1) -> str:
    return str(answer(page, number).locator(".figures").inner_text())


def open_settings(page: Any, *groups: str) -> None:
    page.locator(".open-panel").click()
    for name in groups:
        page.locator(".panel summary", has_text=name).click()


def test_a_sample_answers_at_one_click(page: Any) -> None:
    page.locator(".sample").first.get_by_role("button").first.click()
    assert "red star" in answer_text(page).lower()
    told = figures(page)
    for part in ("first token", "tokens/s", "prompt", "from the prefix cache"):
        assert part in told
    # another test may have asked this server about the same picture
    assert "encoded now" in told or "from the ViT’s cache" in told
    wait_until(lambda: page.locator(".question .media img").count() == 1)


def test_a_file_is_asked_about_and_the_second_turn_comes_from_the_cache(page: Any) -> None:
    add_files(page, {"name": "scene.png", "mimeType": "image/png", "buffer": encode(scene(77))})
    ask(page, "Describe the picture.")
    assert answer_text(page, 0)
    assert "\n0 from the prefix cache" in figures(page, 0)
    assert "encoded now" in figures(page, 0)
    ask(page, "How many shapes are there?")
    assert answer_text(page, 1)
    hits = answer(page, 1).locator(".figures .cached.hit").inner_text()
    assert int(hits.split()[0]) >= 16
    assert "of pictures" in hits
    assert "encoded now" not in figures(page, 1)


def test_a_picture_is_pasted_and_another_dropped(page: Any) -> None:
    bytes_of = {name: list((SAMPLES / f"{name}.png").read_bytes()) for name in ("red-star", "three-shapes")}
    page.evaluate(
        """(found) => {
            const transfer = (name) => {
                const data = new DataTransfer();
                data.items.add(new File([new Uint8Array(found[name])], `${name}.png`, {type: "image/png"}));
                return data;
            };
            const goesUp = {bubbles: true, cancelable: true};
            document.getElementById("question").dispatchEvent(
                new ClipboardEvent("paste", {clipboardData: transfer("red-star"), ...goesUp}));
            document.querySelector(".view").dispatchEvent(
                new DragEvent("drop", {dataTransfer: transfer("three-shapes"), ...goesUp}));
        }""",
        bytes_of,
    )
    page.locator(".composer .media-place").nth(1).wait_for()
    page.get_by_role("button", name="Remove three-shapes.png").click()
    wait_until(lambda: page.locator(".composer .media-place").count() == 1)
    ask(page, "What shape is in the picture?")
    assert "star" in answer_text(page).lower()


def test_a_video(page: Any) -> None:
    """A red ball goes from left to right."""
    frames = np.full((16, 112, 112, 3), 200, np.uint8)
    y, x = np.mgrid[:112, :112]
    for number, frame in enumerate(frames):
        frame[(x - 16 - 5 * number) ** 2 + (y - 56) ** 2 < 200] = (220, 30, 20)
    add_files(page, {"name": "ball.mp4", "mimeType": "video/mp4", "buffer": encode_video(frames, 8)})
    ask(page, "Which way does the circle move?")
    assert "right" in answer_text(page).lower()
    wait_until(lambda: page.locator(".question video").count() == 1)


def test_every_sample_is_answered(page: Any) -> None:
    """With what can be seen in it: a question that the model does not know would be a bad advertisement."""
    buttons = page.locator(".sample-questions button")
    told = {}
    for number in range(buttons.count()):
        page.locator(".new-chat").click()
        question = buttons.nth(number).inner_text()
        buttons.nth(number).click()
        told[question] = answer_text(page)
    assert not [question for question, said in told.items() if "do not know" in said]
    assert told["Which way does the star move?"] == "To the right."
    assert (told["What number is shown?"], told["How many bars are there?"]) == ("427.", "Four.")


def test_an_answer_streams_and_stops(page: Any) -> None:
    open_settings(page, "More about sampling")
    page.locator("#set-min_tokens").fill("600")
    page.locator("#set-max_tokens").fill("600")
    ask(page, "Describe the picture.")
    shown = page.locator(".answer > .markdown")
    wait_until(lambda: len(shown.inner_text()) > 20)
    assert page.locator(".answer").get_attribute("aria-busy") == "true"
    before = len(shown.inner_text())
    wait_until(lambda: len(shown.inner_text()) > before)
    page.locator("#question").press("Escape")
    assert "stopped" in figures(page)
    wait_until(lambda: page.locator(".send.stop").is_hidden())
    length = len(shown.inner_text())
    page.get_by_role("button", name="Answer again").click()
    wait_until(lambda: page.locator(".send.stop").is_visible())
    page.locator(".send.stop").click()
    assert "stopped" in figures(page)
    assert length > 20


def test_a_question_is_edited_and_answered_again(page: Any) -> None:
    add_files(page, STAR)
    ask(page, "What shape is in the picture?")
    answer(page, 0)
    ask(page, "Is there a circle?")
    answer(page, 1)
    page.locator(".question").first.hover()
    page.locator(".question").first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the question").fill("What color is it?")
    page.get_by_label("Edit the question").press("Enter")
    assert "red" in answer_text(page).lower()
    assert (page.locator(".question").count(), page.locator(".answer").count()) == (1, 1)
    wait_until(lambda: page.locator(".question .media img").count() == 1)
    page.get_by_role("button", name="Answer again").click()
    assert "red" in answer_text(page).lower()
    wait_until(lambda: page.locator(".answer").count() == 1)


def test_an_answer_is_copied(page: Any, context: Any, server: Server) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url)
    page.locator(".sample").first.get_by_role("button").first.click()
    text = answer_text(page)
    answer(page).get_by_role("button", name="Copy").click()
    page.locator("#announcements", has_text="Copied").wait_for(state="attached")
    assert page.evaluate("navigator.clipboard.readText()").strip() == text


def test_an_answer_follows_a_schema(page: Any) -> None:
    open_settings(page, "JSON answers")
    page.locator("#set-schema").fill("{ no")
    assert page.locator("#set-schema").get_attribute("aria-invalid") == "true"
    page.locator("#set-schema").fill(json.dumps(SCHEMA))
    assert page.locator("#set-schema").get_attribute("aria-invalid") == "false"
    add_files(page, STAR)
    ask(page, "What shape is in the picture?")
    code = answer(page).locator("> .code code")
    assert json.loads(code.inner_text()).keys() == {"shape", "color"}
    answer(page).get_by_role("button", name="Show the request").click()
    assert '"json_schema"' in page.locator("dialog").inner_text()
    page.keyboard.press("Escape")
    wait_until(lambda: page.locator("dialog").count() == 0)


def test_a_tool_is_called_and_its_result_goes_back(page: Any) -> None:
    open_settings(page, "Tools")
    page.locator("#set-tools").fill(json.dumps(TOOLS))
    page.locator("#set-tool_choice").select_option("required")
    ask(page, "How is the weather?")
    call = answer(page).locator(".call")
    assert "get_weather" in call.inner_text()
    assert json.loads(call.locator("code").inner_text()) == {"city": "Rome"}
    page.locator("#set-tool_choice").select_option("none")
    page.get_by_label("Result of get_weather").fill('{"sky": "clear"}')
    page.get_by_role("button", name="Send and go on").click()
    wait_until(lambda: page.locator(".answer").count() == 2)
    answer(page, 1)
    assert "clear" in page.locator(".tool-result").inner_text()
    answer(page, 1).get_by_role("button", name="Show the request").click()
    assert '"tool_call_id"' in page.locator("dialog").inner_text()


def test_an_error_is_told_in_the_servers_words(page: Any) -> None:
    page.watched.allowed = ("status of 400",)  # the browser's own note
    add_files(page, {"name": "broken.png", "mimeType": "image/png", "buffer": b"\x89PNG\r\n\x1a\nbroken"})
    ask(page, "What is this?")
    told = answer(page).locator(".error").inner_text()
    assert "picture" in told or "image" in told
    ask(page, "Hello")
    assert page.locator(".answer").nth(1).locator(".answer-foot > *").first.wait_for() is None


def test_other_files_are_refused_at_once(page: Any) -> None:
    page.locator("#pick-files").set_input_files([{"name": "a.txt", "mimeType": "text/plain", "buffer": b"a"}])
    page.locator(".toast", has_text="a.txt is neither a picture nor a video").wait_for()
    page.locator(".toast").get_by_role("button").click()
    assert page.locator(".toast").count() == 0


def test_chats_are_kept_renamed_saved_and_deleted(page: Any, tmp_path: Path) -> None:
    add_files(page, STAR)
    ask(page, "What shape is in the picture?")
    answer(page)
    page.locator(".new-chat").click()
    ask(page, "Hello")
    answer(page)
    page.reload()
    names = page.locator(".chat-name")
    wait_until(lambda: names.count() == 2)
    assert names.all_inner_texts() == ["Hello", "What shape is in the picture?"]
    assert page.locator(".question").inner_text().strip() == "Hello", "the chat of the address"
    names.nth(1).click()
    assert "star" in answer_text(page).lower()
    wait_until(lambda: page.evaluate("document.querySelector('.question img')?.naturalWidth > 0"))
    assert "first token" in figures(page)
    ask(page, "What color is it?")
    assert "red" in answer_text(page, 1).lower(), "the picture is still sent"
    page.get_by_role("button", name="Rename “What shape is in the picture?”").click()
    page.get_by_role("textbox", name="Name").fill("A star")
    page.get_by_role("textbox", name="Name").press("Enter")
    wait_until(lambda: "A star" in names.all_inner_texts())
    with page.expect_download() as download:
        page.get_by_role("button", name="Save “A star” as a file").click()
    saved = json.loads(Path(download.value.path()).read_text())
    assert [turn["role"] for turn in saved["turns"]] == ["user", "assistant"] * 2
    assert saved["turns"][0]["media"][0]["url"].startswith("data:image/png;base64,")
    page.get_by_role("button", name="Delete “A star”").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    wait_until(lambda: names.all_inner_texts() == ["Hello"])
    page.reload()
    wait_until(lambda: names.count() == 1)


def test_settings_reach_the_server(page: Any) -> None:
    open_settings(page)
    page.locator("#set-system").fill("Answer in one word.")
    page.locator("#set-temperature").fill("0.5")
    page.locator("#set-seed").fill("7")
    page.locator("#set-max_tokens").fill("3")
    page.locator("#set-thinking").select_option("off")
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "Hello")
    body = json.loads(asked.value.post_data)
    assert body["messages"][0] == {"role": "system", "content": "Answer in one word."}
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.5, 7, 3)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "3 tokens" in figures(page)
    page.locator(".new-chat").click()
    assert page.locator("#set-seed").input_value() == "7", "a new chat begins with the last settings"
    page.get_by_role("button", name="Reset all").click()
    assert page.locator("#set-seed").input_value() == ""
