"""Finds the parser of a model: its family names the module when it reads the checkpoint."""

from __future__ import annotations

import importlib

from pipeline.families import ModelInfo
from pipeline.wire.prompts import Chat, Prompt
from workers.api.parsers.base import Parser

PLAIN = "workers.api.parsers.plain"


def parser_of(info: ModelInfo, prompt: Prompt) -> type[Parser]:
    """A prompt without a chat's template is continued, not answered: nothing in it is read as reasoning."""
    module = info.parser if isinstance(prompt, Chat) else PLAIN
    parser: type[Parser] = importlib.import_module(module).PARSER
    return parser
