"""The mutated requests: seeded, of every kind, and not so wrong that all are refused at once."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
from collections import Counter

import pytest
from PIL import Image

from tools.answers import KEYS
from tools.mutations import Mutated, _change_text, _damaged, _written, make_media, mutated_request
from tools.valid_requests import INQUIRIES, Media

EVERY_CHANGE = {
    *(
        "media bytes",
        "drop",
        "repeat",
        "key twice",
        "more keys",
        "rename",
        "wrap",
        "exchange",
        "string",
        "retype",
    ),
    *("bytes", "cut", "character set", "more text", "no object", "compressed"),
    *("content type", "encoding", "length", "chunks", "header", "path", "method"),
}


@pytest.fixture(scope="module")
def media() -> Media:
    return make_media()


def made(media: Media, count: int, seed: int = 5) -> list[Mutated]:
    return [mutated_request(seed, number, media, "secret") for number in range(count)]


def test_a_seed_and_a_number_make_one_request(media: Media) -> None:
    first = made(media, 300)
    assert first == made(make_media(), 300)
    assert len({one.request for one in first}) > 290
    assert first != made(media, 300, seed=6)


def test_every_change_is_made_and_some_requests_are_valid(media: Media) -> None:
    counts = Counter(change for one in made(media, 2000) for change in one.what or ("none",))
    assert counts.keys() >= EVERY_CHANGE
    assert 200 < counts["none"] < 800


def test_every_route_gets_its_share(media: Media) -> None:
    paths = Counter(one.path for one in made(media, 2000))
    assert paths.keys() == {"", *KEYS, *INQUIRIES}
    assert min(paths[path] for path in KEYS) > 50


def test_the_head_of_a_framed_request_tells_its_length(media: Media) -> None:
    for one in made(media, 1000):
        head, _, body = one.request.partition(b"\r\n\r\n")
        assert b"Authorization: Bearer secret" in head
        if one.is_framed and (length := re.search(rb"Content-Length: (\d+)", head)):
            assert int(length[1]) == len(body), one.what


def test_the_media_are_what_they_say_they_are(media: Media) -> None:
    for kind, files in media.items():
        for data in files:
            if kind.startswith("image/"):
                picture = Image.open(io.BytesIO(data))
                picture.load()
                assert f"image/{picture.format}".lower() == kind


def test_damaged_media_differ_and_stay_small(media: Media) -> None:
    rng, data = random.Random(1), media["image/jpeg"][0]
    damaged = [_damaged(data, rng) for _ in range(200)]
    assert sum(one != data for one in damaged) > 180
    assert max(map(len, damaged)) < 20_000


def test_what_json_cannot_say_is_written() -> None:
    assert _written({"a": "@raw:0@", "@again:a@": 5}) == b'{"a": NaN, "a": 5}'


def test_texts_are_cut_recoded_and_compressed() -> None:
    what: list[str] = []
    rng, data = random.Random(2), json.dumps({"a": "b" * 100}).encode()
    changed = [_change_text(data, rng, what) for _ in range(200)]
    assert gzip.decompress(changed[what.index("compressed")]) == data
    assert all(data.startswith(text) for text, how in zip(changed, what, strict=True) if how == "cut")
