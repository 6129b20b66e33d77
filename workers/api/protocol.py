"""OpenAI's chat completions as structs, and their conversion into the pipeline's own.

Fields that would change the answer and are not served are refused by name, never ignored.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal, assert_never

import msgspec

from pipeline.errors import ErrorInfo, RequestError
from pipeline.messages import ChatMessage, ImagePart, Part, TextPart, VideoPart
from pipeline.sampling import MAX_LOGIT_BIASES, MAX_LOGPROBS, SamplingParams

MAX_CHOICES = 16
ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ImageUrl(msgspec.Struct):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class TextContent(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class ImageContent(msgspec.Struct, tag_field="type", tag="image_url"):
    image_url: ImageUrl | str | None = None  # none: the content is what was sent under this uuid before
    uuid: str | None = None
    min_pixels: int | None = None  # it is resized to an area in these limits, narrower than the server's
    max_pixels: int | None = None


class VideoUrl(msgspec.Struct):
    url: str | list[str]  # a list: the frames


class VideoContent(msgspec.Struct, tag_field="type", tag="video_url"):
    video_url: VideoUrl | str | list[str] | None = None
    uuid: str | None = None
    fps: float | None = None  # frames a second that the model sees
    max_frames: int | None = None
    min_pixels: int | None = None  # of each frame
    max_pixels: int | None = None


Content = TextContent | ImageContent | VideoContent


class RequestMessage(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[Content] | None = None
    name: str | None = None  # a label for people: no chat template of the family shows it
    # What OpenAI's client sends back of an earlier answer; only empty values are taken.
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: Any = None
    function_call: Any = None
    tool_calls: list[Any] | None = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False


class ChatCompletionRequest(msgspec.Struct, forbid_unknown_fields=True):
    messages: list[RequestMessage]
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    stop_token_ids: list[int] | None = None
    priority: int | None = None  # lower goes first
    cache_salt: str | None = None  # only requests with the same one share cached prefixes
    # These say nothing about the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Known to OpenAI's or vLLM's API and not served: only the value that changes nothing is taken.
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    response_format: Any = None
    modalities: list[str] | None = None


NEUTRAL: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
NEUTRAL_IN_MESSAGE = ("refusal", "annotations", "audio", "function_call", "tool_calls")
_DECODER = msgspec.json.Decoder(ChatCompletionRequest, strict=True)


def decode_request(body: bytes | bytearray) -> ChatCompletionRequest:
    """Raises RequestError, naming the field, for a body that is no such request."""
    try:
        try:
            return _DECODER.decode(body)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            # Python clients write NaN and Infinity; read so, the range checks can name the field that holds it.
            return msgspec.convert(json.loads(body), ChatCompletionRequest)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        missing = re.search(r"(?:missing required|contains unknown) field `([^`]+)`", message)
        parts = [path.rstrip("`").removeprefix("$").removeprefix("."), missing.group(1) if missing else ""]
        field = ".".join(part for part in parts if part)
        raise RequestError(f"{message}{f' in {field}' if field else ''}", field=field) from None
    except (ValueError, RecursionError):
        raise RequestError("the body is not valid JSON") from None


def refuse_unserved(request: ChatCompletionRequest) -> None:
    for field, neutral in NEUTRAL.items():
        value = getattr(request, field)
        if value is not None and value not in neutral:
            raise RequestError(f"{field} is not served by this server, got {value}", field=field)
    for index, message in enumerate(request.messages):
        for field in NEUTRAL_IN_MESSAGE:
            if getattr(message, field):
                raise RequestError(f"{field} in a message is not served by this server", field=f"messages[{index}].{field}")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options need stream to be true", field="stream_options")


def to_messages(request: ChatCompletionRequest) -> list[ChatMessage]:
    """The pipeline's messages; `developer`, OpenAI's newer name for the system role, becomes what models know."""
    return [
        ChatMessage("system" if message.role == "developer" else message.role, _to_content(message.content, index))
        for index, message in enumerate(request.messages)
    ]


def _to_content(content: str | list[Content] | None, index: int) -> str | tuple[Part, ...]:
    if content is None or isinstance(content, str):
        return content or ""
    return tuple(_to_part(part, f"messages[{index}].content[{number}]") for number, part in enumerate(content))


def _to_part(part: Content, field: str) -> Part:
    match part:
        case TextContent():
            return TextPart(part.text)
        case ImageContent():
            image = part.image_url if isinstance(part.image_url, ImageUrl) else ImageUrl(part.image_url or "")
            if image.detail == "low":
                raise RequestError("detail 'low' is not served; max_pixels beside image_url limits the size", field=f"{field}.image_url.detail")
            if not image.url and not (part.image_url is None and part.uuid):
                raise RequestError("the URL of a picture must not be empty", field=f"{field}.image_url")
            return ImagePart(url=image.url, uuid=part.uuid or "", min_pixels=part.min_pixels, max_pixels=part.max_pixels)
        case VideoContent():
            url = part.video_url.url if isinstance(part.video_url, VideoUrl) else part.video_url
            if not (url is None and part.uuid) and (not url or not all(url)):
                raise RequestError("the URL of a video, and of each frame in a list of them, must not be empty", field=f"{field}.video_url")
            if isinstance(url, list) and part.uuid:
                raise RequestError("a list of frames has no uuid", field=f"{field}.uuid")
            return VideoPart(
                url=url if isinstance(url, str) else "", frames=tuple(ImagePart(url=frame) for frame in url) if isinstance(url, list) else (),
                uuid=part.uuid or "", fps=part.fps, max_frames=part.max_frames, min_pixels=part.min_pixels, max_pixels=part.max_pixels,
            )  # fmt: skip
        case _:
            assert_never(part)


def to_sampling(request: ChatCompletionRequest, defaults: dict[str, float]) -> SamplingParams:
    """The request's sampling; what it leaves open is the model's own default. Raises RequestError out of range."""

    def pick(name: str, fallback: float) -> float:
        value = getattr(request, name)
        return defaults.get(name, fallback) if value is None else value

    for field in ("max_tokens", "max_completion_tokens"):
        if (limit := getattr(request, field)) is not None and limit < 1:
            raise RequestError(f"{field} must be at least 1, got {limit}", field=field)
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", field="top_logprobs")
    if request.top_logprobs is not None and not 0 <= request.top_logprobs <= MAX_LOGPROBS:
        raise RequestError(f"top_logprobs must be between 0 and {MAX_LOGPROBS}, got {request.top_logprobs}", field="top_logprobs")
    for field in ("logit_bias", "stop_token_ids"):
        if len(getattr(request, field) or ()) > MAX_LOGIT_BIASES:
            raise RequestError(f"{field} has more than {MAX_LOGIT_BIASES} entries", field=field)
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    return SamplingParams(
        temperature=pick("temperature", 1.0), top_p=pick("top_p", 1.0), top_k=int(pick("top_k", 0)), min_p=pick("min_p", 0.0),
        presence_penalty=request.presence_penalty or 0.0, frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=pick("repetition_penalty", 1.0), logit_bias=_to_logit_bias(request.logit_bias or {}), seed=request.seed,
        max_tokens=request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens,
        min_tokens=request.min_tokens or 0, ignore_eos=request.ignore_eos, stop=stop, stop_token_ids=tuple(request.stop_token_ids or ()),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )  # fmt: skip


def _to_logit_bias(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise RequestError("logit_bias maps token ids, written as strings, to numbers", field="logit_bias") from None


def to_choice(sampling: SamplingParams, index: int) -> SamplingParams:
    """The sampling of one of several answers: each draws numbers of its own."""
    return sampling if sampling.seed is None or not index else msgspec.structs.replace(sampling, seed=(sampling.seed + index) % 2**63)


def num_choices(request: ChatCompletionRequest) -> int:
    """How many answers are asked for. Raises RequestError for too many, or none."""
    count = 1 if request.n is None else request.n
    if not 1 <= count <= MAX_CHOICES:
        raise RequestError(f"n must be between 1 and {MAX_CHOICES}, got {count}", field="n")
    return count


def error_body(error: ErrorInfo) -> dict[str, object]:
    """OpenAI's error object."""
    kind = ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.field or None, "code": error.status}}


def usage(num_prompt_tokens: int, num_output_tokens: int, num_cached_tokens: int) -> dict[str, object]:
    return {
        "prompt_tokens": num_prompt_tokens, "completion_tokens": num_output_tokens, "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }  # fmt: skip
