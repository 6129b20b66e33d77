from __future__ import annotations

import re

import msgspec

from pipeline.wire.clients import IngestMessage
from tools.wire_page import EXAMPLE, PAGE, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run tools/wire_page.py"


def test_the_example_is_what_a_pipeline_reads() -> None:
    dump = re.search(r"bytes \(a client.*?```\n(.*?)```", page(), re.S)
    assert dump is not None
    data = bytes.fromhex("".join(line[6:] for line in dump.group(1).splitlines()))
    assert msgspec.msgpack.decode(data, type=IngestMessage) == EXAMPLE
