"""Takes the screenshots of the page that the docs show: `python -m tools.page_screenshots --base-url
http://127.0.0.1:8000`.

Needs Chromium, playwright (`pip install -e '.[test]'`), and a server with the embedded model.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

OUT = Path(__file__).parent.parent / "docs" / "images"
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
DESK, PHONE = (1200, 900), (390, 780)
NUM_COLORS = 128  # of the saved pictures: the page has few
THEMES = ("light", "dark")
PICTURES_BEFORE_KILL, PICTURES_BEFORE_SHOT = 4, 10  # that are answered, of the lanes' load


def take(browser: Browser, url: str, out: Path, admin_key: str) -> None:
    for theme in THEMES:
        _lanes(browser, url, out, theme, admin_key)
        page = _open(browser, url, DESK, theme)
        _save(page, out / f"page-{theme}.png")
        _chat(page)
        _save(page, out / f"page-chat-{theme}.png")
        page.context.close()
    page = _open(browser, url, PHONE, "light")
    _chat(page)
    _save(page, out / "page-phone.png")
    page.context.close()


def _open(browser: Browser, url: str, size: tuple[int, int], theme: str) -> Page:
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if theme == "dark" else "light",
        locale="en-US",
    )
    page = context.new_page()
    page.goto(f"{url}/")
    page.locator(".sample").nth(5).wait_for()
    page.locator("#model", has_text="-").wait_for(state="attached")
    page.wait_for_load_state("networkidle")
    return page


def _chat(page: Page) -> None:
    """A question about a sample, then one more about the same picture."""
    page.get_by_role("button", name="How many shapes are there?").click()
    page.locator(".answer .figures").first.wait_for()
    page.locator("#question").fill("Where is the heart?")
    page.locator("#question").press("Enter")
    page.locator(".answer .figures").nth(1).wait_for()
    page.mouse.move(0, 0)


def _lanes(browser: Browser, url: str, out: Path, theme: str, admin_key: str) -> None:
    """Streams and pictures under way and, with an admin key, a ViT that has been killed meanwhile."""
    page = _open(browser, url, DESK, theme)
    page.goto(f"{url}/#lanes")
    page.locator("#lanes-demo").click()
    page.locator(".lanes-status", has_text=f"{PICTURES_BEFORE_KILL} of 20").wait_for()
    if admin_key:
        page.get_by_role("button", name="Kill vit.0").click()
        page.get_by_label("Admin key").fill(admin_key)
        page.get_by_role("button", name="Kill it").click()
    page.locator(".lanes-status", has_text=f"{PICTURES_BEFORE_SHOT} of 20").wait_for()
    page.mouse.move(0, 0)
    _save(page, out / f"page-lanes-{theme}.png")
    page.locator("#lanes-demo").click()
    page.context.close()


def _save(page: Page, path: Path) -> None:
    page.wait_for_timeout(400)  # until pictures are drawn and nothing moves
    picture = Image.open(io.BytesIO(page.screenshot()))
    picture.convert("RGB").quantize(NUM_COLORS, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--admin-key", default="", help="of the server: a ViT is killed for the lanes")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--browser", default=shutil.which("chromium"), help="path of Chromium")
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    args.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.browser, args=list(FLAGS))
        take(browser, args.base_url.rstrip("/"), args.out, args.admin_key)
        browser.close()


if __name__ == "__main__":
    main()
