"""The JSON files of a checkpoint, read the way all families need it.

A key that a family must have is asked for with `need`. Class defaults of transformers often differ from what
the published checkpoints say, so a missing key is refused by its name and never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Section = Mapping[str, Any]
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p")


class CheckpointFiles:
    """Settings of a checkpoint by section; a missing file has none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.generation = read_json(folder / "generation_config.json")
        # transformers 5 writes all processors into one file, which it prefers to the older ones.
        together = read_json(folder / "processor_config.json")
        self.processor = together.get("image_processor") or read_json(folder / "preprocessor_config.json")
        self.video_processor = together.get("video_processor") or read_json(
            folder / "video_preprocessor_config.json"
        )

    @property
    def chat_template(self) -> str:
        """Empty where there is none: for some, what a model writes shows only here."""
        return read_chat_template(self.folder) or ""

    @property
    def text(self) -> Section:
        """The text model's settings: nested as transformers 5 writes them, or flat as on the hub."""
        section: Section = self.config.get("text_config") or self.config
        return section

    @property
    def vision(self) -> Section:
        section: Section = self.need(self.config, "vision_config")
        return section

    @property
    def rope(self) -> Section:
        """Of the text model, under its old or its new name, on either level. The old one wins where both are
        there, as in transformers."""
        for section in (self.text, self.config):
            for name in ("rope_scaling", "rope_parameters"):
                found: Section = section.get(name) or {}
                if found:
                    return found
        return {}

    def need(self, section: Section, key: str) -> Any:
        """Raises ValueError where the checkpoint does not say it."""
        if section.get(key) is None:
            raise ValueError(f"model {str(self.folder)!r} does not say {key!r}, which has no safe default")
        return section[key]

    def integer(self, section: Section, key: str) -> int:
        value = self.need(section, key)
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            value = value[0]  # transformers allows one number for each axis
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"model {str(self.folder)!r} has {key} = {value!r}, which is no whole number")
        return value

    def expect(self, section: Section, key: str, served: object) -> None:
        """Raises ValueError where the checkpoint says something else than the only thing that is served."""
        if section.get(key) not in (None, served):
            what = f"has {key} = {section[key]!r}; served is {served!r} only"
            raise ValueError(f"model {str(self.folder)!r} {what}")

    def eos_token_ids(self) -> tuple[int, ...]:
        """Those of generation, else those of the text model."""
        for section in (self.generation, self.text, self.config):
            value: int | list[int] | None = section.get("eos_token_id")
            if value is not None:
                return (value,) if isinstance(value, int) else tuple(value)
        return ()

    def all_eos_token_ids(self) -> tuple[int, ...]:
        """Those of generation and those of the text model: files exist in which each lacks some."""
        found: dict[int, None] = {}  # in order
        for section in (self.generation, self.text, self.config):
            value: int | list[int] | None = section.get("eos_token_id")
            if value is not None:
                found |= dict.fromkeys([value] if isinstance(value, int) else value)
        return tuple(found)

    def default_sampling(self) -> dict[str, float]:
        """The model's own: greedy where it says that nothing is to be sampled."""
        samples = self.generation.get("do_sample") is not False
        names = (*(SAMPLING_KEYS if samples else ()), "repetition_penalty")
        found = {name: self.generation[name] for name in names if self.generation.get(name) is not None}
        if "top_k" in found:
            found["top_k"] = int(found["top_k"])
        return found if samples else {**found, "temperature": 0.0}


def read_chat_template(folder: Path) -> str | None:
    """The template where transformers puts it: a file of its own, `chat_template.json`, or the tokenizer's
    settings."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text()
    for name in ("chat_template.json", "tokenizer_config.json"):
        if isinstance(template := read_json(folder / name).get("chat_template"), str):
            return template
    return None


def pixel_limits(processor: Section) -> tuple[int, int]:
    """The least and the largest area of a processor's settings, 0 where they say none."""
    size: Section = processor.get("size") or {}
    return (
        int(processor.get("min_pixels") or size.get("shortest_edge") or 0),
        int(processor.get("max_pixels") or size.get("longest_edge") or 0),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Empty for a file that is not there. Raises ValueError, naming it, for one that is no JSON object."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no JSON object: {error}") from None
