"""The page's files over HTTP: headers, packing, who may have them."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from launcher.checkpoints import EMBEDDED
from pipeline.config import ApiKey
from tests.workers.api.serving import FakeClient, endpoint, get, post, serving
from workers.api.page.files import STATIC, files_under
from workers.api.page.routes import CONTENT_SECURITY_POLICY

MOST_BYTES = 400_000  # of the whole page, packed
SAMPLES = EMBEDDED / "samples"
MODULES = sorted([*STATIC.glob("*.js"), *(STATIC / "lanes").glob("*.js")])


async def test_the_page_and_its_files_are_served() -> None:
    async with serving(endpoint()) as site:
        index = await site.ask(get("/"))
        assert (index.status, index.headers["content-type"]) == (200, "text/html; charset=utf-8")
        named = re.findall(r'(?:src|href)="(/page/[^"]+)"', index.body.decode())
        assert len(named) > 3
        for path in named:
            assert (await site.ask(get(path))).status == 200, path
        assert (await site.ask(get("/page/nothing.js"))).error.status == 404


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/page/setup.json", "/page/vendor/marked.js"])
async def test_every_file_says_what_a_browser_may_do(path: str) -> None:
    async with serving(endpoint()) as site:
        headers = (await site.ask(get(path))).headers
    assert headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    for rule in ("default-src 'none'", "frame-ancestors 'none'", "trusted-types 'none'"):
        assert rule in CONTENT_SECURITY_POLICY
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert "http" not in CONTENT_SECURITY_POLICY
    assert (headers["x-frame-options"], headers["x-content-type-options"]) == ("DENY", "nosniff")
    assert headers["referrer-policy"] == "no-referrer"


async def test_a_file_is_packed_and_not_sent_twice() -> None:
    async with serving(endpoint()) as site:
        plain = await site.ask(get("/page/main.js"))
        packed = await site.ask(get("/page/main.js", "Accept-Encoding: gzip, br"))
        assert (packed.headers["content-encoding"], gzip.decompress(packed.body)) == ("gzip", plain.body)
        again = await site.ask(get("/page/main.js", f"If-None-Match: {plain.headers['etag']}"))
        assert (again.status, again.body) == (304, b"")
        other = await site.ask(get("/page/main.js", 'If-None-Match: W/"other"'))
        assert other.status == 200


async def test_a_cache_between_tells_packed_files_from_plain_ones_also_for_other_origins() -> None:
    for origins, expected in (((), "Accept-Encoding"), (("http://a",), "Accept-Encoding, Origin")):
        async with serving(endpoint(allowed_origins=origins)) as site:
            assert (await site.ask(get("/page/main.js"))).headers["vary"] == expected


@pytest.mark.parametrize(
    "path",
    [
        "/page/../routes.py",
        "/page/%2e%2e/routes.py",
        "/page/..%2froutes.py",
        "/page//etc/passwd",
        "/page/%2fetc%2fpasswd",
        "/page/samples/../../model/config.json",
        "/page/vendor",
    ],
)
async def test_no_other_file_can_be_had(path: str) -> None:
    async with serving(endpoint(samples=SAMPLES)) as site:
        assert (await site.ask(get(path))).error.status == 404


async def test_without_a_page() -> None:
    async with serving(endpoint(disable_page=True)) as site:
        for path in ("/", "/page/main.js", "/page/setup.json"):
            assert (await site.ask(get(path))).error.status == 404
    keys = (ApiKey("a", "secret"),)
    async with serving(endpoint(disable_page=True, named_keys=keys)) as site:
        assert (await site.ask(get("/"))).error.status == 401


async def test_the_page_needs_no_key_and_says_that_the_api_does() -> None:
    async with serving(endpoint(named_keys=(ApiKey("a", "secret"),), admin_key="root")) as site:
        assert (await site.ask(get("/"))).status == 200
        setup = await site.ask(get("/page/setup.json"))
        assert json.loads(setup.body)["needs_key"] is True
        assert b"secret" not in setup.body
        assert b"root" not in setup.body
        assert (await site.ask(get("/v1/models"))).error.status == 401
    async with serving(endpoint()) as site:
        assert json.loads((await site.ask(get("/page/setup.json"))).body)["needs_key"] is False


async def test_another_name_of_the_host_gets_no_page() -> None:
    """A foreign page that points its own name at this server could read the page, and act in its name."""
    async with serving(endpoint()) as site:
        for path in ("/", "/page/main.js", "/page/setup.json"):
            request = get(path).replace(b"Host: localhost", b"Host: evil.example")
            assert (await site.ask(request)).error.status == 403


async def test_the_page_is_served_before_the_model_is_ready() -> None:
    async with serving(endpoint(is_ready=False)) as site:
        for path in ("/", "/page/main.js", "/page/setup.json"):
            assert (await site.ask(get(path))).status == 200


async def test_the_page_takes_nothing_from_the_memory_of_requests() -> None:
    server = endpoint(api_memory_mib=128)
    server._budget._limit = 0
    async with serving(server) as site:
        assert (await site.ask(get("/"))).status == 200
        assert (await site.ask(post())).error.status == 503


async def test_pictures_that_come_with_the_model() -> None:
    async with serving(endpoint(samples=SAMPLES)) as site:
        samples = json.loads((await site.ask(get("/page/setup.json"))).body)["samples"]
        assert len(samples) >= 6
        for sample in samples:
            picture = await site.ask(get(f"/page/samples/{sample['file']}"))
            kind = {".png": "image/png", ".mp4": "video/mp4"}[Path(sample["file"]).suffix]
            assert picture.headers["content-type"] == kind
            assert picture.body == (SAMPLES / sample["file"]).read_bytes()
            assert sample["questions"].keys() == sample["name"].keys() == {"en", "zh"}
            assert all(sample["questions"].values())
    async with serving(endpoint(FakeClient())) as site:
        assert json.loads((await site.ask(get("/page/setup.json"))).body)["samples"] == []
        assert (await site.ask(get("/page/samples/red-star.png"))).error.status == 404


def test_the_page_is_light() -> None:
    files = files_under(STATIC)
    assert sum(len(file.packed or file.body) for file in files.values()) <= MOST_BYTES


def test_what_is_taken_over_comes_with_its_licence() -> None:
    vendor = STATIC / "vendor"
    for path in vendor.glob("*.js"):
        library = path.stem.partition("-")[0]
        assert (vendor / f"{library}-licence.txt").read_text(), path


# The modules, as a linter would read them.


@pytest.mark.parametrize("path", [*MODULES, STATIC / "index.html"], ids=lambda path: path.name)
def test_no_module_makes_markup_of_text(path: Path) -> None:
    """The browser enforces it, too: `require-trusted-types-for`."""
    text = path.read_text()
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "DOMParser",
        "eval(",
        "new Function",
    ):
        assert word not in text
    assert not re.search(r"https?://(?!www\.w3\.org/)\S", text), "nothing comes from elsewhere"
    assert not re.search(r'\s(style|on\w+)="', text), "styles and scripts are files"


def test_both_languages_have_all_texts_and_no_other() -> None:
    found = _strings()
    assert found["en"].keys() == found["zh"].keys()
    for name, text in found["en"].items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", found["zh"][name])), name
    used = "\n".join(path.read_text() for path in MODULES if path.name != "strings.js")
    for name in re.findall(r'\bt\(\s*"([^"]+)"', used):
        assert name in found["en"], f"{name} is shown, and no text"
    for name in found["en"]:
        stem = name.rpartition(".")[0]
        built = re.search(rf"`{re.escape(stem)}\.\$\{{|`{re.escape(stem.partition('.')[0])}\.\$\{{", used)
        assert f'"{name}"' in used or built or name in ("image", "video"), f"{name} is never shown"


def _strings() -> dict[str, dict[str, str]]:
    """Of the shell, and of the views that bring their own."""
    found: dict[str, dict[str, str]] = {"en": {}, "zh": {}}
    language = "en"
    for path in sorted(STATIC.rglob("strings.js")):
        for line in path.read_text().splitlines():
            if begun := re.match(r"  (en|zh): \{$", line):
                language = begun[1]
            elif entry := re.match(r'    "?([\w. ]+)"?: "(.*)",$', line):
                found[language][entry[1]] = entry[2]
    return found
