"""Prompts: a chat, a text, or tokens.

Media bytes are further frames of the message that holds the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

# What a request may tell the model's chat template, each a scalar. A template ignores those it does not know.
TEMPLATE_OPTIONS = (
    "enable_thinking",
    "preserve_thinking",
    "thinking",
    "thinking_budget",
    "reasoning_effort",
    "add_vision_id",
)
MAX_TEMPLATE_OPTION = 256  # characters of a text
ROLES = ("system", "user", "assistant", "tool")
SAME_ROLES = {"developer": "system"}  # OpenAI's newer name for the role that models know
TemplateOption = bool | int | float | str


class TextPart(msgspec.Struct, frozen=True, tag="text", forbid_unknown_fields=True):
    text: str


class ImagePart(msgspec.Struct, frozen=True, tag="image", forbid_unknown_fields=True):
    """A picture by URL, or in a further frame of the message: its bytes, or its bytes in base64."""

    url: str = ""
    frame: int = -1
    is_base64: bool = False
    # The client's name for the content: content cached under it need not be sent again.
    uuid: str = ""
    min_pixels: int | None = None  # the picture is resized to an area within these and the server's limits
    max_pixels: int | None = None
    resized_height: int | None = None  # instead: resized to this size, rounded to the model's patches
    resized_width: int | None = None


class VideoPart(msgspec.Struct, frozen=True, tag="video", forbid_unknown_fields=True):
    """A video by URL or in a further frame of the message, as a picture is; or as a list of pictures, its
    frames."""

    url: str = ""
    frame: int = -1
    is_base64: bool = False
    frames: tuple[ImagePart, ...] = ()
    uuid: str = ""  # as a picture's
    fps: float | None = None  # frames a second that the model sees
    max_frames: int | None = None
    min_pixels: int | None = None  # of each frame
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    total_pixels: int | None = None  # of all frames together; a pair counts as one
    nframes: int | None = None  # frames that the model sees, instead of `fps`
    min_frames: int | None = None
    video_start: float | None = None  # seconds: frames are taken from this window of the video
    video_end: float | None = None
    timestamps: tuple[float, ...] | None = None  # of a list of frames: when each was taken, in seconds


Part = TextPart | ImagePart | VideoPart


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that the assistant called. `arguments`: JSON, as the model wrote it."""

    id: str
    name: str
    arguments: str = ""


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    role: str  # system, developer (the same), user, assistant, or tool: the result of a call
    content: str | tuple[Part, ...] = ""
    tool_calls: tuple[ToolCall, ...] = ()  # of an assistant
    tool_call_id: str = ""  # of a tool: the call that this answers
    name: str = ""
    reasoning: str | None = None  # of an assistant: the thoughts before the content


class Chat(msgspec.Struct, frozen=True, tag="chat", omit_defaults=True, forbid_unknown_fields=True):
    """The model's chat template makes a prompt of the messages.

    `continue_final_message` leaves the last message open, so that the model goes on writing it: it needs
    `add_generation_prompt` to be false.
    """

    messages: tuple[ChatMessage, ...]
    tools: bytes = b""  # JSON: a list of functions, as OpenAI's clients write it; empty: none
    template_options: Mapping[str, TemplateOption] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class Text(msgspec.Struct, frozen=True, tag="text", forbid_unknown_fields=True):
    """A prompt as it is, without a template. A special token that is spelt out in the text is that token."""

    text: str


class Tokens(msgspec.Struct, frozen=True, tag="tokens", omit_defaults=True, forbid_unknown_fields=True):
    """A prompt that is tokenised already.

    The media fill its placeholders, in order and exactly: of each picture or video there is either the one
    placeholder that chat templates write, or all that it becomes in a prompt. Any other is refused.
    """

    token_ids: bytes  # int32
    media: tuple[ImagePart | VideoPart, ...] = ()


Prompt = Chat | Text | Tokens
