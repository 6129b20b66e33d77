"""Finds the tower of a model: its family names the module."""

from __future__ import annotations

import importlib

from pipeline.families import ModelInfo
from workers.vit.models.base import Tower


def tower_of(info: ModelInfo) -> Tower:
    tower: Tower = importlib.import_module(info.family.tower).TOWER
    return tower
