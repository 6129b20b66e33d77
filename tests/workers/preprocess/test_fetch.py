"""What may come in, and what may not."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import hashlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from pipeline.config import PreprocessConfig
from pipeline.wire.errors import RequestError
from tests.workers.preprocess.hosts import host, reply
from workers.preprocess.download_turns import Asker
from workers.preprocess.downloads import MAX_VALIDATOR
from workers.preprocess.fetch import Fetched, Fetcher, Validators, decode_base64

Get = Callable[..., Awaitable[bytes]]


handled: list[str] = []  # paths that the local server was asked for


async def handle(request: web.Request) -> web.StreamResponse:
    handled.append(request.path)
    match request.path:
        case "/picture":
            return web.Response(body=b"picture")
        case "/versioned":
            etag = {"ETag": '"1"'}
            return (
                web.Response(status=304, headers=etag)
                if request.headers.get("If-None-Match") == '"1"'
                else web.Response(body=b"one", headers=etag)
            )
        case "/dated":
            date = {"Last-Modified": "Mon, 23 Nov 2026 08:00:00 GMT"}
            is_same = request.headers.get("If-Modified-Since") == date["Last-Modified"]
            return (
                web.Response(status=304, headers=date) if is_same else web.Response(body=b"one", headers=date)
            )
        case "/moved":
            raise web.HTTPFound("/versioned")
        case "/unasked":
            return web.Response(status=304)
        case "/large":
            return web.Response(body=bytes(3 << 20))
        case "/endless":
            response = web.StreamResponse()
            await response.prepare(request)
            with contextlib.suppress(ConnectionError):
                while True:
                    await response.write(bytes(1 << 16))
            return response
        case "/slow":
            await asyncio.sleep(30)
            return web.Response()
        case "/loop":
            raise web.HTTPFound("/loop")
        case "/once":
            raise web.HTTPFound("/picture")
        case "/to-file":
            raise web.HTTPFound("file:///etc/passwd")
        case _:
            raise web.HTTPNotFound


@pytest.fixture
async def base() -> AsyncIterator[str]:
    handled.clear()
    application = web.Application()
    application.router.add_get("/{tail:.*}", handle)
    runner = web.AppRunner(application, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.fixture
async def get() -> AsyncIterator[Get]:
    fetchers: list[Fetcher] = []

    async def fetch(url: str, **options: object) -> bytes:
        fetchers.append(
            Fetcher(
                PreprocessConfig(
                    **{"max_media_mib": 1, "media_timeout_s": 1.0, "allow_private_media": True, **options}
                )
            )
        )
        fetched = await fetchers[-1].fetch(url, "messages[0].content[0].image_url")
        assert fetched.data is not None
        return fetched.data

    yield fetch
    for fetcher in fetchers:
        await fetcher.close()


async def test_downloads_and_follows_a_redirect(base: str, get: Get) -> None:
    assert await get(f"{base}/picture") == b"picture"
    assert await get(f"{base}/once") == b"picture"


async def test_a_signed_url_is_asked_for_byte_for_byte_through_redirects(get: Get) -> None:
    """Up to ten hops; a signature covers the letters of each."""
    targets = [f"/b%40c{number}?X-Cred=a%2Fb&s=%7Ex%2A&" for number in range(11)]

    async def answer(target: str, writer: asyncio.StreamWriter) -> None:
        hop = targets.index(target) + 1
        location = (targets[hop:] or [""])[0]
        writer.write(reply(b"", f"Location: {location}", status="302 Found") if location else reply())

    async with host(answer) as served:
        assert await get(served.base + targets[0]) == b"picture"
        assert served.lines == [f"GET {target} HTTP/1.1" for target in targets]


async def test_a_location_in_raw_bytes_leads_to_those_bytes(get: Get) -> None:
    async def answer(target: str, writer: asyncio.StreamWriter) -> None:
        found = {"/utf-8": "/ä ä".encode(), "/latin-1": "/ä".encode("latin-1")}.get(target)
        writer.write(reply().replace(b"200 OK", b"302 Found\r\nLocation: " + found) if found else reply())

    async with host(answer) as served:
        for path in ("/utf-8", "/latin-1"):
            assert await get(served.base + path) == b"picture"
        assert [line.split()[1] for line in served.lines[1::2]] == ["/%C3%A4%20%C3%A4", "/%E4"]


async def test_each_hop_is_judged(base: str, get: Get) -> None:
    """The first host is allowed, what it redirects to is not, however many hops later."""
    for target in (f"{base}/picture".replace("127.0.0.1", "localhost"), "//evil.example/x"):

        async def answer(path: str, writer: asyncio.StreamWriter, target: str = target) -> None:
            hop = int(path[1:])
            location = f"Location: {hop + 1 if hop < 5 else target}"
            writer.write(reply(b"", location, status="307 Temporary Redirect"))

        async with host(answer) as served:
            with pytest.raises(RequestError, match="not among the allowed"):
                await get(f"{served.base}/0", allowed_media_domains=("127.0.0.1",))
            assert len(served.heads) == 6
    assert handled == []


async def test_a_redirect_without_a_place_is_refused(get: Get) -> None:
    async def answer(target: str, writer: asyncio.StreamWriter) -> None:
        location = {"/none": (), "/broken": ("Location: http://[x",)}[target]
        writer.write(reply(b"", *location, status="301 Moved Permanently"))

    async with host(answer) as served:
        with pytest.raises(RequestError, match="does not say where"):
            await get(f"{served.base}/none")
        with pytest.raises(RequestError, match="cannot be understood"):
            await get(f"{served.base}/broken")


async def test_who_wants_the_same_at_the_same_time_shares_one_download(base: str) -> None:
    fetcher = Fetcher(PreprocessConfig(max_media_mib=1, media_timeout_s=1.0, allow_private_media=True))
    fields = [f"field {number}" for number in range(3)]
    assert (
        await asyncio.gather(*(fetcher.fetch(f"{base}/picture", field) for field in fields))
        == [Fetched(b"picture", None)] * 3
    )
    assert handled == ["/picture"]
    refusals = await asyncio.gather(
        *(fetcher.fetch(f"{base}/missing", field) for field in fields), return_exceptions=True
    )
    assert [refusal.info.field for refusal in refusals if isinstance(refusal, RequestError)] == fields
    assert await fetcher.fetch(f"{base}/picture", "later") == Fetched(b"picture", None)
    assert handled == ["/picture", "/missing", "/picture"], "nothing is kept"
    await fetcher.close()


@pytest.mark.parametrize("path", ["/versioned", "/dated"])
async def test_what_has_not_changed_is_not_sent_again(base: str, path: str) -> None:
    fetcher = Fetcher(PreprocessConfig(allow_private_media=True))
    data, validators = await fetcher.fetch(base + path, "")
    assert data == b"one"
    assert validators is not None
    assert await fetcher.fetch(base + path, "", validators) == Fetched(None, validators)
    assert (await fetcher.fetch(base + path, "", validators._replace(etag='"0"'))).data == b"one"
    assert await fetcher.fetch(f"{base}/moved", "") == Fetched(b"one", None), (
        "a redirect may lead elsewhere next time"
    )
    assert (await fetcher.fetch(f"{base}/moved", "", validators)).data == b"one"
    with pytest.raises(RequestError, match="status 304"):
        await fetcher.fetch(f"{base}/unasked", "")
    await fetcher.close()


async def test_a_tenants_refusal_is_no_other_tenants() -> None:
    """Each has its own budget: what is too much for one is not for the other, who wants the same at once."""

    async def answer(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(bytes(1 << 19)))

    async with host(answer) as served:
        fetcher = Fetcher(PreprocessConfig(allow_private_media=True, max_open_media_mib=1))
        with fetcher._in_flight.counted("full") as count:
            assert count(1 << 20)
            asked = [
                fetcher.fetch(f"{served.base}/picture", "", asker=Asker(tenant, "r"))
                for tenant in ("full", "other")
            ]
            refusal, fetched = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(refusal, RequestError)
        assert refusal.info.status == 503
        assert fetched == Fetched(bytes(1 << 19), None)
        await fetcher.close()


async def test_a_validator_of_any_length_is_not_kept() -> None:
    headers: list[str] = []

    async def answer(_: str, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(b"one", *headers))

    longest = f'"{"e" * (MAX_VALIDATOR - 2)}"'
    async with host(answer) as served:
        fetcher = Fetcher(PreprocessConfig(allow_private_media=True))
        headers[:] = [f"ETag: {longest}", f"Last-Modified: {'d' * (MAX_VALIDATOR + 1)}"]
        assert await fetcher.fetch(f"{served.base}/", "") == Fetched(b"one", Validators(longest, ""))
        headers[:] = [f'ETag: {longest}"']
        assert await fetcher.fetch(f"{served.base}/", "") == Fetched(b"one", None)
        await fetcher.close()


async def test_a_video_is_kept_in_a_file_without_a_name_and_limited(base: str, tmp_path: Path) -> None:
    (tmp_path / "video").write_bytes(bytes(range(256)) * 9000)
    fetcher = Fetcher(
        PreprocessConfig(
            allow_private_media=True, max_video_mib=3, max_media_mib=1, allowed_local_media_path=str(tmp_path)
        )
    )
    for url, content in (
        (f"{base}/large", bytes(3 << 20)),
        (str(tmp_path / "video"), bytes(range(256)) * 9000),
    ):
        file = (await fetcher.fetch_file(url, "")).data
        assert file is not None
        assert (file.nbytes, file.digest) == (len(content), hashlib.sha256(content).digest())
        with open(file.path, "rb") as reopened:  # noqa: ASYNC230
            assert reopened.read() == content
    with pytest.raises(RequestError, match="larger than 3 MiB") as refusal:
        await fetcher.fetch_file(f"{base}/endless", "field")
    assert (refusal.value.info.status, refusal.value.info.field) == (413, "field")
    (tmp_path / "video").write_bytes(bytes((3 << 20) + 1))
    with pytest.raises(RequestError, match="larger than 3 MiB"):
        await fetcher.fetch_file(str(tmp_path / "video"), "")
    await fetcher.close()


async def test_a_download_ends_when_the_last_who_wants_it_leaves(base: str) -> None:
    fetcher = Fetcher(PreprocessConfig(max_media_mib=1, media_timeout_s=60.0, allow_private_media=True))
    first, second = (asyncio.create_task(fetcher.fetch(f"{base}/slow", "")) for _ in range(2))
    await asyncio.sleep(0.2)
    first.cancel()
    await asyncio.sleep(0.1)
    (download,) = fetcher._downloads.values()
    assert not download.task.done(), "the second still wants it"
    second.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    await asyncio.sleep(0)
    assert download.task.cancelled()
    assert not fetcher._downloads
    assert handled == ["/slow"]
    await fetcher.close()


@pytest.mark.parametrize(
    ("path", "words", "status"),
    [
        ("/missing", "status 404", 400),
        ("/large", "larger than 1 MiB", 413),
        ("/endless", "larger than 1 MiB", 413),
        ("/slow", "within 1 s", 400),
        ("/loop", "redirects more than", 400),
        ("/to-file", "neither http nor https", 400),
    ],
)
async def test_bad_answers_are_refused(base: str, get: Get, path: str, words: str, status: int) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        await get(base + path)
    assert caught.value.info.status == status
    assert caught.value.info.field == "messages[0].content[0].image_url"


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "2130706433",
        "0x7f.1",
        "127.1",
        "0177.0.0.1",
        "0",
        "127\u30021",
        "127.0.0.1.",
    ],
)
async def test_a_running_local_server_is_not_reached_by_any_name_or_number(
    host: str, base: str, get: Get
) -> None:
    """The server would answer: only the check stands between."""
    url = base.replace("127.0.0.1", host) + "/picture"
    with pytest.raises(RequestError, match="cannot be reached"):
        await get(url, allow_private_media=False)
    assert handled == []


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.1/x",
        "http://169.254.169.254/latest",
        "http://[fe80::1]/x",
        "http://[64:ff9b::7f00:1]/x",
    ],
)
async def test_private_networks_are_not_asked(url: str, get: Get) -> None:
    start = time.monotonic()
    with pytest.raises(RequestError, match="cannot be reached"):
        await get(url, allow_private_media=False)
    assert time.monotonic() - start < 0.5, "refused, not tried"


async def test_only_allowed_hosts(base: str, get: Get) -> None:
    assert await get(f"{base}/picture", allowed_media_domains=("127.0.0.1",)) == b"picture"
    for url in (
        f"{base}/picture",
        "http://good.example\\@evil.example/x",
        "http://good.example@evil.example/x",
    ):
        with pytest.raises(RequestError, match=r"not among the allowed|cannot be understood"):
            await get(url, allowed_media_domains=("good.example",))


async def answer(_: str, writer: asyncio.StreamWriter) -> None:
    writer.write(reply())


async def test_hosts_are_told_who_asks_and_what_can_be_read() -> None:
    async with host(answer) as served:
        words = {"ops@example.org": "(+ops@example.org)", "": "(a server for Qwen-VL models)"}
        for contact in words:
            fetcher = Fetcher(PreprocessConfig(allow_private_media=True, media_contact=contact))
            await fetcher.fetch(f"{served.base}/picture", "")
            agent = served.header("User-Agent") or ""
            assert re.fullmatch(rf"vlm-pipeline/[0-9.]+ {re.escape(words[contact])}", agent)
            kinds = (served.header("Accept") or "").split(",")
            assert {"image/jpeg", "image/png", "image/webp", "image/*;q=0.8", "*/*;q=0.5"} <= set(kinds)
            assert [kind for kind in kinds if ";" in kind] == kinds[-2:], "what cannot be read is wanted less"
            assert served.header("Accept-Encoding") == "identity"
            await fetcher.fetch_file(f"{served.base}/video", "")
            assert served.header("Accept") == "video/*,*/*;q=0.5"
            await fetcher.close()


@pytest.mark.parametrize("contact", ["a\r\nX: y", "a)b", "(", "ä", "x" * 201])
def test_a_contact_is_plain_text(contact: str) -> None:
    with pytest.raises(ValueError, match="media_contact"):
        PreprocessConfig(media_contact=contact)


async def test_a_proxy_is_asked_and_resolves_the_names(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    """For http it gets the whole URL, to the letter; the user and the word in its own are for it alone."""

    async def proxied(target: str, writer: asyncio.StreamWriter) -> None:
        found = reply(b"", "Location: /%7Eb?", status="302 Found")
        writer.write(found if target.endswith("c?d=%7E") else reply())

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with host(proxied) as proxy:
        options = {"allow_private_media": False, "media_proxy": f"http://user:word@127.0.0.1:{proxy.port}"}
        urls = ["http://nowhere.test/c?d=%7E", "http://nowhere.test/%7Eb?"]
        assert await get(urls[0], **options) == b"picture"
        assert proxy.lines == [f"GET {url} HTTP/1.1" for url in urls]
        assert proxy.header("Host") == "nowhere.test"
        assert proxy.header("Proxy-Authorization") == "Basic dXNlcjp3b3Jk"
        assert proxy.header("Authorization") is None


async def test_what_is_refused_is_refused_before_the_proxy(get: Get) -> None:
    hosts = ("127.0.0.1", "localhost", "a.localhost.", "10.0.0.1", "[::1]", "2130706433", "0x7f.1", "0")
    async with host(answer) as proxy:
        for name in hosts:
            with pytest.raises(RequestError, match="cannot be reached"):
                await get(f"http://{name}/x", allow_private_media=False, media_proxy=proxy.base)
        with pytest.raises(RequestError, match="not among the allowed"):
            await get("http://evil.test/x", media_proxy=proxy.base, allowed_media_domains=("good.test",))
        assert not proxy.heads


async def test_https_is_tunnelled_and_a_proxy_that_refuses_is_named(get: Get) -> None:
    async def refuse(target: str, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(b"", status="403 Forbidden"))

    async with host(refuse) as proxy:
        with pytest.raises(RequestError, match="proxy for media") as refusal:
            await get("https://nowhere.test/x", allow_private_media=False, media_proxy=proxy.base)
        assert refusal.value.info.status == 502
        assert proxy.lines == ["CONNECT nowhere.test:443 HTTP/1.1"]
        closed = proxy.base
    with pytest.raises(RequestError, match="proxy for media"):
        await get("http://nowhere.test/x", allow_private_media=False, media_proxy=closed)


PROXIES = ["proxy:3128", "https://proxy", "socks5://p", "http://", "http://a b", "http://p/x", "http://p:x"]


@pytest.mark.parametrize("url", PROXIES)
def test_a_proxy_is_an_http_url(url: str) -> None:
    with pytest.raises(ValueError, match="media_proxy"):
        PreprocessConfig(media_proxy=url)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: "
FAULTS = {
    "/early": (reply(bytes(100))[:-50], "broke off"),
    "/chunks": (CHUNKED + b"5\r\nab", "broke off"),
    "/no-chunk": (CHUNKED + b"zz\r\n", r"broke off|cannot be reached"),
    "/head": (b"HTTP/1.1 200 OK\r\nContent-", "cannot be reached"),
    "/nothing": (b"", "cannot be reached"),
    "/other": (b"SSH-2.0-OpenSSH_9.9\r\n", "cannot be reached"),
    "/length": (LENGTH + b"many\r\n\r\npicture", "cannot be reached"),
    "/two-lengths": (LENGTH + b"1\r\nContent-Length: 2\r\n\r\nab", "cannot be reached"),
    "/longer": (reply(b"picture") + b"and more", "cannot be reached"),
    "/long-line": (b"HTTP/1.1 200 OK\r\nX: " + bytes(1 << 16), "cannot be reached"),
    "/gzip": (reply(gzip.compress(b"picture"), "Content-Encoding: gzip"), "compressed by gzip"),
    **{
        f"/{status}": (reply(b"", status=f"{status} Some"), f"status {status}")
        for status in (201, 202, 206, 300, 304, 401, 403, 429, 500, 502, 503, 599)
    },
    "/204": (b"HTTP/1.1 204 No Content\r\n\r\n", "status 204"),
}


@pytest.mark.parametrize("path", FAULTS)
async def test_faults_of_a_host_are_told(path: str, get: Get) -> None:
    async def fail(target: str, writer: asyncio.StreamWriter) -> None:
        writer.write(FAULTS[target][0])
        writer.close()

    async with host(fail) as served:
        with pytest.raises(RequestError, match=FAULTS[path][1]) as refusal:
            await get(served.base + path)
        assert refusal.value.info.status == 400


@pytest.mark.parametrize("line", [b"X-Y: z\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"])
async def test_endless_heads_end(line: bytes, get: Get) -> None:
    async def answer_for_ever(target: str, writer: asyncio.StreamWriter) -> None:
        if line.startswith(b"X"):
            writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(line)
            await writer.drain()
            await asyncio.sleep(0.001)

    async with host(answer_for_ever) as served:
        start = time.monotonic()
        with pytest.raises(RequestError, match=r"cannot be reached|within 1 s"):
            await get(served.base)
        assert time.monotonic() - start < 3.0


async def test_what_a_host_says_of_its_media_is_not_believed(get: Get) -> None:
    bodies = {
        "/type": reply(b"picture", "Content-Type: text/html; charset=nonsense"),
        "/encoding": reply(b"picture", "Content-Encoding: gzip"),
    }

    async def lie(target: str, writer: asyncio.StreamWriter) -> None:
        writer.write(bodies[target])

    async with host(lie) as served:
        for path in (*bodies, *bodies):
            assert await get(served.base + path) == b"picture"


@pytest.mark.parametrize(
    "url", ["ftp://host/x", "gopher://x", "javascript:1", "http://", "http://[broken", "no-scheme", ""]
)
async def test_other_urls_are_refused(url: str, get: Get) -> None:
    with pytest.raises(RequestError):
        await get(url)


PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(300)).decode()
JPEG = base64.b64encode(b"\xff\xd8\xff\xe0" + bytes(300)).decode()


@pytest.mark.parametrize(
    "url", [PNG, JPEG, "R0lGODlhAQ", "UklGRg", "AAAAIGZ0eXA", JPEG + "A" * 10**7, "a/b.png"], ids=len
)
async def test_base64_that_is_no_url_is_told_what_a_url_begins_with(
    url: str, get: Get, tmp_path: Path
) -> None:
    for allowed in ("", str(tmp_path)):
        with pytest.raises(
            RequestError, match=r"must begin with http.*base64 alone is none: it goes behind data:"
        ):
            await get(url, allowed_local_media_path=allowed)


async def test_a_url_has_a_length(get: Get) -> None:
    with pytest.raises(RequestError, match="at most 65536 characters"):
        await get("http://host/" + "x" * 10**7)


async def test_files_only_under_the_allowed_folder(get: Get, tmp_path: Path) -> None:
    folder, outside = tmp_path / "media", tmp_path / "secret"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"inside")
    outside.write_bytes(b"outside")
    (folder / "link").symlink_to(outside)
    (folder / "large").write_bytes(bytes(2 << 20))
    allowed = {"allowed_local_media_path": str(folder)}
    assert await get(f"file://{folder}/a.png", **allowed) == b"inside"
    assert await get(f"{folder}/a.png", **allowed) == b"inside"
    for path in (
        f"file://{outside}",
        f"{folder}/link",
        f"{folder}/../secret",
        f"{folder}",
        f"{folder}/missing",
        "/dev/zero",
        f"{folder}\0",
    ):
        with pytest.raises(RequestError, match="outside the allowed folder"):
            await get(path, **allowed)
    with pytest.raises(RequestError, match="larger than"):
        await get(f"{folder}/large", **allowed)
    with pytest.raises(RequestError, match="--allowed-local-media-path"):
        await get(f"{folder}/a.png")


def test_base64() -> None:
    assert decode_base64(b"aGVsbG8=", 100, "f") == b"hello"
    assert decode_base64(memoryview(b"aGVsbG8"), 100, "f") == b"hello"
    for broken in (b"aGVs*bG8=", b"a", "bäh".encode()):
        with pytest.raises(RequestError, match="broken"):
            decode_base64(broken, 100, "f")
    with pytest.raises(RequestError) as caught:
        decode_base64(b"A" * 200, 100, "f")
    assert caught.value.info.status == 413
