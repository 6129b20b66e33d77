"""From chat messages to token ids: the model's own template and tokenizer, and placeholders for items.

A user's text stays text: a special token spelt out in it never becomes one, so that it can neither end a turn
nor take a picture's place. Placeholders are matched to items by position, never by searching token ids.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, assert_never

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from pipeline.families import Placeholders, Segment
from pipeline.wire.errors import RequestError, shown
from pipeline.wire.messages import ChatMessage, ImagePart, Part, Span, TextPart, VideoPart

ROLES = ("system", "user", "assistant")


class Prompt(NamedTuple):
    token_ids: list[int]
    spans: list[tuple[Span, ...]]  # of each picture or video, in the order of the messages


class _TemplateRefusal(Exception):
    """The template refused the messages, with its own message."""


class ChatPrompt:
    """Raises ValueError for a folder without a chat template."""

    def __init__(
        self, folder: Path, image_token_id: int, video_token_id: int, max_tokens: int = 1 << 20
    ) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # Special tokens are matched here, in the template's own text only; all else is plain text.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        alternatives = sorted(map(re.escape, self._special_ids), key=len, reverse=True)
        self._specials = re.compile("|".join(alternatives) or r"(?!)")
        self._first_characters = re.compile(
            "|".join(sorted({re.escape(token[0]) for token in self._special_ids})) or r"(?!)"
        )
        self._image_token_id, self._video_token_id = image_token_id, video_token_id
        # A longer text cannot fit `max_tokens`, whatever its tokens: it is refused before tokenization.
        self._max_characters = max_tokens * max(map(len, self._tokenizer.get_vocab()))
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(
            value, ensure_ascii=False, **options
        )
        environment.globals["raise_exception"] = _raise_refusal
        self._template = environment.from_string(_read_template(folder))

    def build(self, messages: Sequence[ChatMessage], segments: Sequence[Sequence[Segment]]) -> Prompt:
        """`segments[i]` replace the i-th picture or video. Raises RequestError that names the field."""
        # Inserted after every character with which a special token begins, in users' text, so that no special
        # token can begin there, not even spread over several parts; removed again below.
        mark = secrets.token_hex(8)
        media = [part for part in parts_of(messages) if not isinstance(part, TextPart)]
        wanted = [
            self._video_token_id if isinstance(part, VideoPart) else self._image_token_id for part in media
        ]
        if (
            length := sum(len(text) for message in messages for text in texts_of(message))
        ) > self._max_characters:
            raise RequestError(
                f"the text of {length} characters is longer than the model's context", field="messages"
            )
        rendered = self._render(
            [self._as_template_message(index, message, mark) for index, message in enumerate(messages)]
        )
        token_ids: list[int] = []
        spans: list[tuple[Span, ...]] = []
        start = 0
        for match in self._specials.finditer(rendered):
            token_ids.extend(self._encode(rendered[start : match.start()].replace(mark, "")))
            start = match.end()
            token_id = self._special_ids[match.group()]
            if len(spans) < len(wanted) and token_id == wanted[len(spans)]:
                spans.append(self._place(segments[len(spans)], token_id, token_ids))
            else:
                token_ids.append(token_id)
        token_ids.extend(self._encode(rendered[start:].replace(mark, "")))
        if len(spans) != len(wanted):
            what = f"the model's chat template placed {len(spans)} of {len(wanted)} pictures and videos"
            raise RequestError(what, field="messages")
        return Prompt(token_ids, spans)

    def _place(self, segments: Sequence[Segment], token_id: int, token_ids: list[int]) -> tuple[Span, ...]:
        """Appends an item to the prompt. Its text is the family's: special tokens in it are intended."""
        spans: list[Span] = []
        for segment in segments:
            match segment:
                case Placeholders(num_tokens):
                    spans.append(Span(len(token_ids), num_tokens))
                    token_ids.extend([token_id] * num_tokens)
                case str():
                    token_ids.extend(self._encode_with_specials(segment))
                case _:
                    assert_never(segment)
        return tuple(spans)

    def _encode_with_specials(self, text: str) -> list[int]:
        token_ids: list[int] = []
        start = 0
        for match in self._specials.finditer(text):
            token_ids.extend(self._encode(text[start : match.start()]))
            token_ids.append(self._special_ids[match.group()])
            start = match.end()
        return token_ids + self._encode(text[start:])

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids) if text else []

    def _as_template_message(self, index: int, message: ChatMessage, mark: str) -> dict[str, Any]:
        if message.role not in ROLES:
            what = f"unknown role {shown(message.role)}; known are {', '.join(ROLES)}"
            raise RequestError(what, field=f"messages[{index}].role")

        def plain(text: str) -> str:
            return self._first_characters.sub(lambda match: match.group() + mark, text)

        if isinstance(content := message.content, str):
            return {"role": message.role, "content": plain(content)}
        parts = [_as_template_part(part, plain) for part in content]
        if all("text" in part for part in parts):
            # Some templates take lists of parts not for every role; without pictures the parts are one text.
            return {"role": message.role, "content": "".join(part["text"] for part in parts)}
        return {"role": message.role, "content": parts}

    def _render(self, messages: list[dict[str, Any]]) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=True)
        except _TemplateRefusal as refusal:
            raise RequestError(
                f"the model's chat template refuses the messages: {refusal}", field="messages"
            ) from None
        except (
            TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
        ):
            raise RequestError(
                "the model's chat template cannot render the messages", field="messages"
            ) from None


def _as_template_part(part: Part, plain: Callable[[str], str]) -> dict[str, str]:
    match part:
        case TextPart():
            return {"type": "text", "text": plain(part.text)}
        case ImagePart():
            return {"type": "image"}
        case VideoPart():
            return {"type": "video"}
        case _:
            assert_never(part)


def parts_of(messages: Sequence[ChatMessage]) -> list[Part]:
    return [part for message in messages if not isinstance(message.content, str) for part in message.content]


def texts_of(message: ChatMessage) -> list[str]:
    if isinstance(message.content, str):
        return [message.content]
    return [part.text for part in message.content if isinstance(part, TextPart)]


def _raise_refusal(reason: str) -> None:
    raise _TemplateRefusal(reason)


def _read_template(folder: Path) -> str:
    """The template, as transformers writes it: its own file, `chat_template.json`, or the tokenizer's
    config."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text()
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (path := folder / name).is_file() and isinstance(
            template := json.loads(path.read_text()).get("chat_template"), str
        ):
            return template
    raise ValueError(f"model {str(folder)!r} has no chat template")
