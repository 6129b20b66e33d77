"""The documentation: generated pages are current, the site builds without a warning and needs no other
host."""

from __future__ import annotations

import html.parser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import fields_page, memory_page, options_page
from tools.field_meanings import MEANINGS, OF_ROUTES
from workers.api.endpoints.registry import endpoints

ROOT = Path(__file__).parents[2]
LOADING = {
    "script": "src",
    "img": "src",
    "link": "href",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
}
OUTSIDE = re.compile(r"(https?:)?//")
# Names in the theme's script. Of these a browser asks only for what a page uses, and none does (diagrams, a
# repository's stars), or what only a browser of before 2020 lacks.
UNUSED = ("unpkg.com/", "api.github.com", "github.com", "gitlab", "clipboardjs.com/", "fb.me", "www.w3.org")
OURS = ("http://127.0.0.1",)


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.classes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.classes |= set((found.get("class") or "").split())
        if tag == "a":
            self.links.append(found.get("href") or "")
        elif value := found.get(LOADING.get(tag, "")):
            self.loaded.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-q",
        "-f",
        ".mkdocs.yml",
        "-d",
        str(folder),
    ]
    # Without it the theme advertises its successor.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text())
    return page


def test_every_page_is_in_the_site(site: Path) -> None:
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= {path.stem for path in site.glob("*.html")}


def test_every_page_of_the_navigation_is_there() -> None:
    named = set(re.findall(r"^ +- (?:[^:\n]+: )?([\w.-]+\.md)$", (ROOT / ".mkdocs.yml").read_text(), re.M))
    there = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert there == named


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    pages = {path: read(path) for path in site.rglob("*.html")}
    assert {
        path.name: page.loaded for path, page in pages.items() if any(map(OUTSIDE.match, page.loaded))
    } == {}
    assert not any("mermaid" in page.classes for page in pages.values())
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)[\s\"']*(https?:)?//", path.read_text()), path
    for path in (site / "assets" / "javascripts").glob("bundle*.js"):
        hosts = re.findall(r"https?://([\w./-]+)", path.read_text())
        assert [host for host in hosts if not host.startswith(UNUSED)] == []


def test_links_stay_in_the_site(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert [one for one in read(path).links if OUTSIDE.match(one) and not one.startswith(OURS)] == [], (
            path.name
        )


@pytest.mark.parametrize("module", [options_page, fields_page])
def test_generated_pages_are_current(module: object) -> None:
    assert module.PAGE.read_text() == module.page(), f"run {module.__name__}"  # type: ignore[attr-defined]


def test_the_page_of_memory_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of its models: all take half a minute."""
    written = memory_page.PAGE.read_text()
    names = [line.split(" | ")[0].strip("| ") for line in written.splitlines() if line.startswith("| Qwen")]
    assert names == list(memory_page.PUBLISHED)
    few = {name: memory_page.PUBLISHED[name] for name in ("Qwen2-VL-2B", "Qwen3.5-0.8B")}
    monkeypatch.setattr(memory_page, "PUBLISHED", few)
    kept = [
        line
        for line in written.splitlines()
        if not line.startswith("| Qwen") or line.split(" | ")[0][2:] in few
    ]
    assert kept == memory_page.page().splitlines(), "run tools/memory_page.py"


def test_every_field_has_words_and_all_words_a_field() -> None:
    served = {(path, name) for path, route in endpoints().items() for name in route.fields.__struct_fields__}
    assert set(MEANINGS) == {name for _, name in served}
    assert set(OF_ROUTES) <= served


def test_the_readme_has_the_commands_of_ci_and_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    for command in ("-m launcher", "-m pytest -n 2"):
        assert sum(bool(re.match(rf"python3 -m venv .*{command}$", line)) for line in lines) == 1


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
