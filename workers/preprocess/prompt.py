"""From a prompt to token ids: the model's own template and tokenizer, and a placeholder for every picture.

What a user writes in a chat is text, whatever it looks like: a special token spelt out in it never becomes
one, so it can neither end a turn nor take a picture's place. Placeholders belong to pictures by position,
never by searching token ids.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, assert_never

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from pipeline.families import Placeholders, Segment, WithoutMarks
from pipeline.families.files import read_chat_template
from pipeline.wire.errors import RequestError, context_overflow, shown
from pipeline.wire.generation import Span
from pipeline.wire.packing import pack_int32, unpack_int32
from pipeline.wire.prompts import (
    Chat,
    ChatMessage,
    ImagePart,
    Part,
    Prompt,
    Text,
    TextPart,
    Tokens,
    VideoPart,
)

Tool = Mapping[str, Any]
ROLES = ("system", "user", "assistant")


class TokenizedPrompt(NamedTuple):
    token_ids: list[int]
    spans: list[tuple[Span, ...]]  # of each picture or video, in the order of the messages


class _Run(NamedTuple):
    """Placeholders of an item."""

    item: int
    token_id: int
    num_tokens: int


_Piece = str | int | _Run  # of a prompt: text, a special token, placeholders


class _TemplateRefusal(Exception):
    """The template refused the messages, with its own message."""


class PromptBuilder:
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
        self._max_tokens = max_tokens
        self._longest_token = max(map(len, self._tokenizer.get_vocab()))  # in characters
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(
            value, ensure_ascii=False, **options
        )
        environment.globals["raise_exception"] = _raise_refusal
        self._template = environment.from_string(_read_template(folder))

    def build(
        self, prompt: Prompt, segments: Sequence[Sequence[Segment]], tools: Sequence[Tool] = ()
    ) -> TokenizedPrompt:
        """`segments[i]` take the place of the i-th picture or video of a chat. `tools` are for the template,
        as OpenAI's clients write them. Raises RequestError, naming the field at fault.
        """
        match prompt:
            case Chat(messages):
                return self._build_chat(messages, segments, tools)
            case Text(text):
                self._check_length(len(text), "prompt")
                return self._without_media(self._tokenize(self._split(text), 0).token_ids)
            case Tokens(token_ids):
                return self._without_media(unpack_int32(token_ids).tolist())
            case _:
                assert_never(prompt)

    def token_sequences(self, words: Sequence[str]) -> tuple[bytes, ...]:
        """The words as a model writes them, at a text's beginning and behind a space: int32 each."""
        spellings = (text for word in words for text in (word.lstrip() or word, f" {word.lstrip()}"))
        return tuple(dict.fromkeys(pack_int32(self._encode(text)) for text in spellings))

    def _without_media(self, token_ids: list[int]) -> TokenizedPrompt:
        if not {self._image_token_id, self._video_token_id}.isdisjoint(token_ids):
            raise RequestError(
                "the prompt has the placeholder of a picture: pictures come in a chat", field="prompt"
            )
        return TokenizedPrompt(token_ids, [])

    def _check_length(self, num_characters: int, field: str) -> None:
        """Raises RequestError for a text that is too long even if all its tokens are the longest one."""
        least = -(-num_characters // self._longest_token)
        if least > self._max_tokens:
            info = context_overflow(self._max_tokens, least, None, field, is_least=True)
            raise RequestError.from_info(info)

    def _build_chat(
        self, messages: Sequence[ChatMessage], segments: Sequence[Sequence[Segment]], tools: Sequence[Tool]
    ) -> TokenizedPrompt:
        # Put behind every character with which a special token begins, wherever a user writes it, so that no
        # special can begin in a user's text, not even spread over several parts; taken out again below.
        mark = secrets.token_hex(8)
        media = [part for part in parts_of(messages) if not isinstance(part, TextPart)]
        wanted = [
            self._video_token_id if isinstance(part, VideoPart) else self._image_token_id for part in media
        ]
        self._check_length(sum(len(text) for message in messages for text in texts_of(message)), "messages")
        rendered = self._render(
            [self._as_template_message(index, message, mark) for index, message in enumerate(messages)],
            _marked(tools, partial(self._plain, mark)),
        )
        pieces: list[_Piece] = []
        num_placed, start = 0, 0
        left_out = ""  # a mark, where it comes next
        for match in self._specials.finditer(rendered):
            between, special = rendered[start : match.start()], match.group()
            start = match.end()
            is_left_out, left_out = not between and special == left_out, ""
            if is_left_out:
                continue
            pieces.append(between.replace(mark, ""))
            token_id = self._special_ids[special]
            if num_placed < len(wanted) and token_id == wanted[num_placed]:
                left_out = self._place(num_placed, segments[num_placed], token_id, pieces)
                num_placed += 1
            else:
                pieces.append(token_id)
        pieces.append(rendered[start:].replace(mark, ""))
        if num_placed != len(wanted):
            what = f"the model's chat template placed {num_placed} of {len(wanted)} pictures and videos"
            raise RequestError(what, field="messages")
        return self._tokenize(pieces, num_placed)

    def _place(
        self, item: int, segments: Sequence[Segment], token_id: int, pieces: list[_Piece]
    ) -> str:  # fmt: skip
        """Appends an item to the prompt. Its text is the family's: special tokens in it are intended.

        Returns the special token that is left out if it comes next.
        """
        left_out = ""
        for segment in segments:
            match segment:
                case Placeholders(num_tokens):
                    pieces.append(_Run(item, token_id, num_tokens))
                case WithoutMarks(before, left_out):
                    _drop_last(pieces, self._special_ids.get(before))
                case str():
                    pieces += self._split(segment)
                case _:
                    assert_never(segment)
        return left_out

    def _tokenize(self, pieces: Sequence[_Piece], num_items: int) -> TokenizedPrompt:
        """Texts that have come to stand side by side are one text."""
        token_ids: list[int] = []
        spans: list[list[Span]] = [[] for _ in range(num_items)]
        for kind, group in itertools.groupby(pieces, key=type):
            if kind is str:
                token_ids += self._encode("".join(map(str, group)))
                continue
            for piece in group:
                if isinstance(piece, _Run):
                    spans[piece.item].append(Span(len(token_ids), piece.num_tokens))
                    token_ids += [piece.token_id] * piece.num_tokens
                else:
                    assert isinstance(piece, int)
                    token_ids.append(piece)
        return TokenizedPrompt(token_ids, [tuple(of_item) for of_item in spans])

    def _split(self, text: str) -> list[_Piece]:
        """A text in which special tokens are spelt out."""
        pieces: list[_Piece] = []
        start = 0
        for match in self._specials.finditer(text):
            pieces += [text[start : match.start()], self._special_ids[match.group()]]
            start = match.end()
        return [*pieces, text[start:]]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids) if text else []

    def _as_template_message(self, index: int, message: ChatMessage, mark: str) -> dict[str, Any]:
        if message.role not in ROLES:
            what = f"unknown role {shown(message.role)}; known are {', '.join(ROLES)}"
            raise RequestError(what, field=f"messages[{index}].role")

        plain = partial(self._plain, mark)
        if isinstance(content := message.content, str):
            return {"role": message.role, "content": plain(content)}
        parts = [_as_template_part(part, plain) for part in content]
        if all("text" in part for part in parts):
            # Some templates take lists of parts not for every role; without pictures the parts are one text.
            return {"role": message.role, "content": "".join(part["text"] for part in parts)}
        return {"role": message.role, "content": parts}

    def _plain(self, mark: str, text: str) -> str:
        """A user's text, in which no special token can begin."""
        return self._first_characters.sub(lambda match: match.group() + mark, text)

    def _render(self, messages: list[dict[str, Any]], tools: list[Any]) -> str:
        try:
            # Templates ask for `tools` by its truth, or by its being defined.
            return self._template.render(messages=messages, tools=tools or None, add_generation_prompt=True)
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


def _drop_last(pieces: list[_Piece], special: int | None) -> None:
    """Takes a special token off the end of a prompt, if it is there; with the empty text behind it."""
    while pieces and pieces[-1] == "":
        pieces.pop()
    if pieces and pieces[-1] == special:
        pieces.pop()


def _marked(value: Any, plain: Callable[[str], str]) -> Any:
    """A JSON value with all its texts, the names of keys too, made plain."""
    match value:
        case str():
            return plain(value)
        case Mapping():
            return {plain(name): _marked(inner, plain) for name, inner in value.items()}
        case list() | tuple():
            return [_marked(inner, plain) for inner in value]
        case _:
            return value


def parts_of(messages: Sequence[ChatMessage]) -> list[Part]:
    return [part for message in messages if not isinstance(message.content, str) for part in message.content]


def texts_of(message: ChatMessage) -> list[str]:
    if isinstance(message.content, str):
        return [message.content]
    return [part.text for part in message.content if isinstance(part, TextPart)]


def _raise_refusal(reason: str) -> None:
    raise _TemplateRefusal(reason)


def _read_template(folder: Path) -> str:
    if (template := read_chat_template(folder)) is None:
        raise ValueError(f"model {str(folder)!r} has no chat template")
    return template
