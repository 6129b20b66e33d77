"""Finds the parser of a model: its family names the module when it reads the checkpoint."""

from __future__ import annotations

import importlib

from pipeline.families import ModelInfo
from workers.api.parsers.base import Parser


def parser_of(info: ModelInfo) -> type[Parser]:
    parser: type[Parser] = importlib.import_module(info.parser).PARSER
    return parser
