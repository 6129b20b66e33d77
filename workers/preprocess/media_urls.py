"""URLs of media, requested byte for byte as given, since signatures cover the characters of path and query.

yarl splits a URL and canonicalizes scheme, user, host and port; these are checked and connected to. Path and
query stay as given: yarl's canonical form would decode `%7E` and drop the `?` of `/a?`. No networking here.
"""

from __future__ import annotations

import re

from yarl import URL

# The WHATWG's URL Standard, 4.4: these around a URL, and line breaks and tabs within, are ignored.
SURROUNDING = "".join(map(chr, range(0x21)))
BREAKS = re.compile(r"[\t\n\r]")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
UNPRINTABLE = re.compile(r"[^\x21-\x7e]")  # not allowed in an HTTP request line


def parse_media_url(text: str) -> URL:
    """A URL whose `raw_path` holds path and query as given; without a fragment.

    Raises ValueError. Only the form is checked of a URL that is neither http nor https.
    """
    text = BREAKS.sub("", text.strip(SURROUNDING))
    given = URL(text, encoded=True)
    if given.scheme not in ("http", "https"):
        return given
    authority = URL(f"{given.scheme}://{given.raw_authority}/").raw_authority
    if not authority or UNPRINTABLE.search(authority):
        raise ValueError("no host, or none that has a name")
    _, mark, query = text.partition("#")[0].partition("?")
    path = given.raw_path if given.raw_path.startswith("/") else f"/{given.raw_path}"
    target = UNPRINTABLE.sub(_percent, path + mark + query)
    return URL.build(scheme=given.scheme, authority=authority, path=target, encoded=True)


def join_media_url(base: URL, location: str) -> URL:
    """The target of a redirect from `base`, a parsed URL (RFC 3986, section 5.2). Raises ValueError."""
    location = BREAKS.sub("", location.strip(SURROUNDING)).partition("#")[0]
    path, mark, query = location.partition("?")
    base_path = base.raw_path.partition("?")[0]
    origin = f"{base.scheme}://{base.raw_authority}"
    if SCHEME.match(location):
        return parse_media_url(location)
    if location.startswith("//"):
        return parse_media_url(f"{base.scheme}:{location}")
    if location.startswith("/"):
        return parse_media_url(origin + location)
    if not path:
        return parse_media_url(origin + base_path + location) if mark else base
    merged = _without_dot_segments(f"{base_path.rpartition('/')[0]}/{path}")
    return parse_media_url(origin + merged + mark + query)


def _percent(match: re.Match[str]) -> str:
    # Header bytes that are not UTF-8 come as surrogates, and are encoded as the same bytes.
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogateescape"))


def _without_dot_segments(path: str) -> str:
    """RFC 3986, section 5.2.4, for a path that begins with a slash."""
    kept: list[str] = []
    segments = path.split("/")[1:]
    for segment in segments:
        if segment == "..":
            kept = kept[:-1]
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)
