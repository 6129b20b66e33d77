"""Prompts: a chat, a text, or tokens.

Media bytes are further frames of the message that holds the prompt.
"""

from __future__ import annotations

import msgspec


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


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str | tuple[Part, ...]


class Chat(msgspec.Struct, frozen=True, tag="chat", forbid_unknown_fields=True):
    """The model's chat template makes a prompt of the messages."""

    messages: tuple[ChatMessage, ...]


class Text(msgspec.Struct, frozen=True, tag="text", forbid_unknown_fields=True):
    """A prompt as it is, without a template. A special token that is spelt out in the text is that token."""

    text: str


class Tokens(msgspec.Struct, frozen=True, tag="tokens", forbid_unknown_fields=True):
    """A prompt that is tokenised already."""

    token_ids: bytes  # int32


Prompt = Chat | Text | Tokens
