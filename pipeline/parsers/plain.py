"""Of models that write nothing but their answer."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.parsers.base import Content, Parser, ParserEvent


class PlainParser(Parser):
    def add(self, text: str) -> Sequence[ParserEvent]:
        return (Content(text),) if text else ()

    def finish(self) -> Sequence[ParserEvent]:
        return ()
