"""From a prompt to token ids: the model's own template and tokenizer, and a placeholder for every picture.

What a user writes in a chat is text, whatever it looks like: a special token spelt out in it never becomes
one, so it can neither end a turn nor take a picture's place. Placeholders belong to pictures by position,
never by searching token ids.
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, assert_never

from tokenizers import Tokenizer

from pipeline.families import Placeholders, Segment, WithoutMarks
from pipeline.families.chat_template import ChatTemplate
from pipeline.parsers.tool_choice import read_tools
from pipeline.wire.errors import RequestError, context_overflow
from pipeline.wire.generation import Span
from pipeline.wire.packing import pack_int32, unpack_int32
from pipeline.wire.prompts import Chat, ImagePart, Prompt, Text, TextPart, Tokens, VideoPart
from workers.preprocess.chats import num_characters, parts_of, template_message
from workers.preprocess.user_texts import UserTexts


class TokenizedPrompt(NamedTuple):
    token_ids: list[int]
    spans: list[tuple[Span, ...]]  # of each picture or video, in the order of the messages


class _Run(NamedTuple):
    """Placeholders of an item."""

    item: int
    token_id: int
    num_tokens: int


_Piece = str | int | _Run  # of a prompt: text, a special token, placeholders


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
        self._image_token_id, self._video_token_id = image_token_id, video_token_id
        # A longer text cannot fit `max_tokens`, whatever its tokens: it is refused before tokenization.
        self._max_tokens = max_tokens
        self._longest_token = max(map(len, self._tokenizer.get_vocab()))  # in characters
        template = ChatTemplate.read(folder)
        if template is None:
            raise ValueError(f"model {str(folder)!r} has no chat template")
        self._template = template
        self._texts = UserTexts(self._special_ids, template.texts(), template.names())

    def build(self, prompt: Prompt, segments: Sequence[Sequence[Segment]]) -> TokenizedPrompt:
        """`segments[i]` take the place of the i-th picture or video of a chat.

        Raises RequestError, naming the field at fault.
        """
        match prompt:
            case Chat():
                return self._build_chat(prompt, segments)
            case Text(text):
                self._check_length(len(text), "prompt")
                return self._without_media(self._tokenize(self._split(text), 0).token_ids)
            case Tokens(token_ids, media):
                return self._build_tokens(unpack_int32(token_ids).tolist(), media, segments)
            case _:
                assert_never(prompt)

    def token_sequences(self, words: Sequence[str]) -> tuple[bytes, ...]:
        """The words as a model writes them, at a text's beginning and behind a space: int32 each."""
        spellings = (text for word in words for text in (word.lstrip() or word, f" {word.lstrip()}"))
        return tuple(dict.fromkeys(pack_int32(self._encode(text)) for text in spellings))

    def _without_media(self, token_ids: list[int]) -> TokenizedPrompt:
        if not {self._image_token_id, self._video_token_id}.isdisjoint(token_ids):
            raise RequestError(
                "the prompt has the placeholder of a picture or video that no media fill", field="prompt"
            )
        return TokenizedPrompt(token_ids, [])

    def _build_tokens(
        self, token_ids: list[int], media: Sequence[ImagePart | VideoPart],
        segments: Sequence[Sequence[Segment]],
    ) -> TokenizedPrompt:  # fmt: skip
        """Each item stands there as one placeholder, or as all that it becomes."""
        if not media:
            return self._without_media(token_ids)
        pieces: list[_Piece] = []
        num_placed = at = 0
        while at < len(token_ids):
            token_id = token_ids[at]
            if token_id not in (self._image_token_id, self._video_token_id):
                pieces.append(token_id)
                at += 1
                continue
            if num_placed == len(media) or token_id != self._wanted(media[num_placed]):
                raise RequestError(f"no media fill the placeholder at token {at}", field="prompt")
            whole: list[_Piece] = []
            self._place(0, segments[num_placed], token_id, whole)
            become = self._tokenize(whole, 1)
            start = at - become.spans[0][0].offset
            stop = start + len(become.token_ids)
            if start >= 0 and token_ids[start:stop] == become.token_ids:
                del pieces[len(pieces) - (at - start) :]
                pieces += _of_item(whole, num_placed)
                at = stop
            elif token_ids[at + 1 : at + 2] == [token_id]:
                what = f"the placeholders from token {at} on are not those of media[{num_placed}], which has"
                raise RequestError(f"{what} {become.token_ids.count(token_id)}", field="prompt")
            else:
                left_out = self._place(num_placed, segments[num_placed], token_id, pieces)
                at += 1
                at += token_ids[at : at + 1] == [self._special_ids.get(left_out)]
            num_placed += 1
        if num_placed < len(media):
            raise RequestError(f"the prompt has no placeholder for media[{num_placed}]", field="prompt")
        return self._tokenize(pieces, num_placed)

    def _wanted(self, part: ImagePart | VideoPart) -> int:
        return self._video_token_id if isinstance(part, VideoPart) else self._image_token_id

    def _check_length(self, num_characters: int, field: str) -> None:
        """Raises RequestError for a text that is too long even if all its tokens are the longest one."""
        least = -(-num_characters // self._longest_token)
        if least > self._max_tokens:
            info = context_overflow(self._max_tokens, least, None, field, is_least=True)
            raise RequestError.from_info(info)

    def _build_chat(self, chat: Chat, segments: Sequence[Sequence[Segment]]) -> TokenizedPrompt:
        media = [part for part in parts_of(chat.messages) if not isinstance(part, TextPart)]
        wanted = list(map(self._wanted, media))
        self._check_length(num_characters(chat), "messages")
        mark = secrets.token_hex(8)
        rendered = self._render(chat, mark)
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

    def _render(self, chat: Chat, mark: str) -> str:
        plain = partial(self._texts.marked, mark=mark)
        messages = [template_message(index, message) for index, message in enumerate(chat.messages)]
        marked: list[dict[str, Any]] = _marked(messages, plain)
        tools = _marked(read_tools(chat.tools), plain)
        options = _marked(chat.template_options, plain)
        if chat.continue_final_message:
            return self._template.render_open(marked, tools, options)
        return self._template.render(marked, tools, options, chat.add_generation_prompt)


def truncated(prompt: TokenizedPrompt, kept: int | None) -> TokenizedPrompt:
    """Its last `kept` tokens. Raises RequestError where that would leave out a part of a picture or video."""
    cut = 0 if kept is None else len(prompt.token_ids) - kept
    if cut <= 0:
        return prompt
    if any(span.offset < cut for spans in prompt.spans for span in spans):
        what = f"the last {kept} of the prompt's {len(prompt.token_ids)} tokens leave out a part of a picture"
        raise RequestError(f"{what} or video", field="truncate_prompt_tokens")
    spans = [tuple(Span(span.offset - cut, span.length) for span in spans) for spans in prompt.spans]
    return TokenizedPrompt(prompt.token_ids[cut:], spans)


def _of_item(pieces: Sequence[_Piece], item: int) -> list[_Piece]:
    """The pieces of one item, as those of the item with this number."""
    return [piece._replace(item=item) if isinstance(piece, _Run) else piece for piece in pieces]


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
