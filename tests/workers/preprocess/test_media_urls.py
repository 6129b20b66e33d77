"""What was asked for is what was given, letter for letter; what is judged is what is connected to."""

from __future__ import annotations

import pytest

from workers.preprocess.media_urls import join_media_url, parse_media_url

TARGETS = [
    "/",
    "/b%40c?X-Cred=a%2Fb&s=%7Ex%2A",
    "/%7euser/%41%2e%2E/x",
    "/a?",
    "/a??b?",
    "/a//b/../c/./d",
    "//a",
    "/a;p=1,2/b:c@d!$&'()*+",
    '/[x]?a=[b]&c="|^`{}<>\\',
    "/%zz%?%",
    "/a?x=1+2%2B3&x=&=y&&",
    "/x?sig=a%3D%3D&se=2026-11-28T00:00:00Z",
]


@pytest.mark.parametrize("target", TARGETS)
def test_path_and_query_stay_as_given(target: str) -> None:
    url = parse_media_url(f"https://host.example{target}")
    assert url.raw_path_qs == target, "this is what aiohttp asks a host for"
    assert str(url) == f"https://host.example{target}", "this is what it asks a proxy for"


@pytest.mark.parametrize("target", TARGETS)
def test_a_redirect_keeps_its_letters_too(target: str) -> None:
    base = parse_media_url("https://user:word@host.example:8443/a%2Fb/c?x=1")
    other = "" if target.startswith("//") else "https://user:word@host.example:8443"
    if other:
        assert join_media_url(base, target).raw_path_qs == target
        assert join_media_url(base, target).raw_authority == "user:word@host.example:8443"
    assert join_media_url(base, f"http://other.example{target}").raw_path_qs == target
    assert join_media_url(base, f"//other.example{target}").raw_path_qs == target


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("http://h", "/"),
        ("http://h?x", "/?x"),
        ("http://h/a b?c d", "/a%20b?c%20d"),
        ("http://h/ä%C3%A4?q=é%7E", "/%C3%A4%C3%A4?q=%C3%A9%7E"),
        ("http://h/a\x01\x7f", "/a%01%7F"),
        ("http://h/\udce4", "/%E4"),
        ("http://h/a#b", "/a"),
        ("http://h/a?#b", "/a?"),
        ("http://h/a#b?c", "/a"),
        (" \nhttp://h/a\n/b\t ", "/a/b"),
    ],
)
def test_only_what_cannot_be_sent_is_encoded(text: str, target: str) -> None:
    assert parse_media_url(text).raw_path_qs == target


@pytest.mark.parametrize(
    ("text", "authority"),
    [
        ("HTTP://EXAMPLE.Com/A", "example.com"),
        ("http://münchen.example/", "xn--mnchen-3ya.example"),
        ("http://127\u30021/", "127.1"),
        ("http://[::FFFF:127.0.0.1]:80/", "[::ffff:7f00:1]:80"),
        ("http://good.example@evil.example/", "good.example@evil.example"),
    ],
)
def test_the_host_is_made_canonical_before_it_is_judged(text: str, authority: str) -> None:
    assert parse_media_url(text).raw_authority == authority


@pytest.mark.parametrize(
    "text",
    [
        *("http://", "http:///x", "http:x", "http://[broken"),
        *("http://a b/", "http://a\x0bb/", "http://h/\ud800", "http://h:x\x00/"),
    ],
)
def test_what_has_no_host_or_no_bytes_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  whatever yarl or a codec says
        parse_media_url(text)


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("d", "http://h/a%2Fb/d"),
        ("d?", "http://h/a%2Fb/d?"),
        ("../d?y=../z", "http://h/d?y=../z"),
        ("./", "http://h/a%2Fb/"),
        ("..", "http://h/"),
        ("../../../d", "http://h/d"),
        ("?q=%7e", "http://h/a%2Fb/c?q=%7e"),
        ("?", "http://h/a%2Fb/c?"),
        ("#f", "http://h/a%2Fb/c?x=1"),
        ("d#f?g", "http://h/a%2Fb/d"),
        ("file:///etc/passwd", "file:///etc/passwd"),
    ],
)
def test_relative_redirects(location: str, url: str) -> None:
    assert str(join_media_url(parse_media_url("http://h/a%2Fb/c?x=1"), location)) == url
