"""Finds the decoder of a model: its family names the module."""

from __future__ import annotations

import importlib

from pipeline.families import ModelInfo
from workers.llm.models.base import Decoder


def decoder_of(info: ModelInfo) -> type[Decoder]:
    decoder: type[Decoder] = importlib.import_module(info.family.decoder).DECODER
    return decoder
