"""One download by http or https, from the first URL through its redirects to the body.

Every hop is checked before the connection: its scheme, its host (`--allowed-media-domains`), its address.
Sizes are limited while reading. No cookies, no compression, and no proxy but `--media-proxy`, whatever the
environment says.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import aiohttp
from yarl import URL

from pipeline.config import PreprocessConfig
from pipeline.wire.errors import RequestError
from workers.preprocess.bodies import Body, too_large
from workers.preprocess.media_urls import join_media_url
from workers.preprocess.resolver import MediaResolver, is_public
from workers.preprocess.shortages import refusal_of

D = TypeVar("D")
MAX_REDIRECTS = 10
MAX_VALIDATOR = 256  # characters: kept with the URL
CHUNK_BYTES = 1 << 16
GZIP = b"\x1f\x8b"  # no picture and no video begins with this


class Validators(NamedTuple):
    """ETag and Last-Modified of a content, for a conditional request later."""

    etag: str
    last_modified: str

    @property
    def headers(self) -> dict[str, str]:
        return {"If-None-Match": self.etag} if self.etag else {"If-Modified-Since": self.last_modified}


class Fetched(NamedTuple, Generic[D]):
    """`data` is None when the content still has the validators of the request."""

    data: D | None
    validators: Validators | None  # None: the host sent none


class Downloader:
    """Use within one event loop; `close` it at the end."""

    def __init__(self, config: PreprocessConfig, nameservers: Sequence[str] = ()) -> None:
        """`nameservers`, each `address:port`, replace the system's."""
        self._config, self._nameservers = config, nameservers
        self._session: aiohttp.ClientSession | None = None
        self._resolver: MediaResolver | None = None

    async def download(
        self,
        url: URL,
        field: str,
        validators: Validators | None,
        make_body: Callable[[], Body[D]],
        count: Callable[[int], bool],
    ) -> Fetched[D]:
        """The content behind a URL of `parse_media_url`. Raises RequestError, which names the field.

        `count` is called with the size of each piece before it is kept, and returns whether there is room.
        """
        body = make_body()
        try:
            async with asyncio.timeout(self._config.media_timeout_s):
                return await self._follow(url, field, validators, body, count)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise refusal_of(error, self._failure(error, field)) from None
        finally:
            body.close()

    def _failure(self, error: Exception, field: str) -> RequestError:
        """The error of the host or the proxy, unless this machine has a shortage."""
        match error:
            case TimeoutError():
                return RequestError(
                    f"the media did not come within {self._config.media_timeout_s:.0f} s", field=field
                )
            case aiohttp.ClientProxyConnectionError() | aiohttp.ClientHttpProxyError():
                return RequestError(
                    "the server's proxy for media cannot be reached, or refuses", field=field, status=502
                )
            case aiohttp.ClientPayloadError():
                return RequestError("the media's host broke off its answer", field=field)
            case _:
                return RequestError("the media's host cannot be reached", field=field)

    async def _follow(
        self,
        url: URL,
        field: str,
        validators: Validators | None,
        body: Body[D],
        count: Callable[[int], bool],
    ) -> Fetched[D]:
        asked = url
        for _ in range(MAX_REDIRECTS + 1):
            self._check_host(url, field)
            result = await self._get(url, field, validators, body, count)
            if isinstance(result, Fetched):
                # Validators belong to the URL that was fetched; a redirect may lead to another next time.
                return result if url == asked else result._replace(validators=None)
            url, validators = result, None
        raise RequestError(f"the media URL redirects more than {MAX_REDIRECTS} times", field=field)

    async def _get(
        self,
        url: URL,
        field: str,
        validators: Validators | None,
        body: Body[D],
        count: Callable[[int], bool],
    ) -> Fetched[D] | URL:
        """The body, or the target of a redirect."""
        headers = {"Accept": body.accept, **(validators.headers if validators else {})}
        proxy = self._config.media_proxy or None
        async with self._client().get(url, allow_redirects=False, headers=headers, proxy=proxy) as response:
            if response.status == 304 and validators is not None:
                return Fetched(None, validators)
            if response.status in (301, 302, 303, 307, 308):
                return _redirected(url, response.headers.get("Location", ""), field)
            if response.status != 200:
                raise RequestError(f"the media's host answered with status {response.status}", field=field)
            if (response.content_length or 0) > body.max_bytes:
                raise too_large(body.max_bytes, field)
            num_bytes = 0
            async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                if not num_bytes and chunk.startswith(GZIP):
                    message = "the media came compressed by gzip, which was not asked for"
                    raise RequestError(message, field=field)
                num_bytes += len(chunk)
                if num_bytes > body.max_bytes:
                    raise too_large(body.max_bytes, field)
                if not count(len(chunk)):
                    message = "the server is overloaded: too many media are being downloaded"
                    raise RequestError(message, field=field, status=503)
                await body.write(chunk)
            return Fetched(await body.end(), _validators(response.headers))

    def _check_host(self, url: URL, field: str) -> None:
        host = url.host or ""
        allowed = self._config.allowed_media_domains
        if not host or (allowed and host not in allowed):
            raise RequestError("the media's host is not among the allowed ones", field=field)
        if self._config.allow_private_media:
            return
        # The resolver checks names. A host that ends in a number is an address, in one of many spellings
        # (2130706433, 127.1, 0x7f.1): only the canonical one is accepted, and checked here. A proxy resolves
        # names itself; then only localhost is known to be private (RFC 6761).
        last = (url.raw_host or "").rstrip(".").rpartition(".")[2].lower()
        is_address = last.isdigit() or last.startswith("0x") or ":" in host
        if last == "localhost" or (is_address and not is_public(host)):
            raise RequestError("the media's host cannot be reached", field=field)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            # With a proxy, only the proxy's own name is resolved here.
            allow_private = self._config.allow_private_media or bool(self._config.media_proxy)
            self._resolver = MediaResolver(allow_private, self._nameservers)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=self._resolver, limit=0),  # `DownloadTurns` limits
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
                auto_decompress=False,
                headers={"Accept-Encoding": "identity", "User-Agent": user_agent(self._config.media_contact)},
            )
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
        if self._resolver is not None:
            await self._resolver.close()


def user_agent(contact: str) -> str:
    try:
        version = importlib.metadata.version("vlm-pipeline")
    except importlib.metadata.PackageNotFoundError:  # not installed, run from a folder
        version = "0"
    return f"vlm-pipeline/{version} ({f'+{contact}' if contact else 'a server for Qwen-VL models'})"


def _validators(headers: Mapping[str, str]) -> Validators | None:
    """None also for validators that are too long: such content is downloaded each time."""
    values = (headers.get("ETag", ""), headers.get("Last-Modified", ""))
    found = Validators(*(value if len(value) <= MAX_VALIDATOR else "" for value in values))
    return found if any(found) else None


def _redirected(url: URL, location: str, field: str) -> URL:
    if not location:
        raise RequestError("the media's host redirects, but does not say where to", field=field)
    try:
        target = join_media_url(url, location)
    except ValueError:
        raise RequestError("the media URL redirects to what cannot be understood", field=field) from None
    if target.scheme not in ("http", "https"):
        raise RequestError("the media URL redirects to something that is neither http nor https", field=field)
    return target
