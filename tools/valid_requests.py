"""Valid requests to every route, with what a client may say: pictures and videos, structures, tools,
thoughts, streams. Seeded; no URL in them leads off the loopback address."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tools.hostile import text

Json = dict[str, Any]
Media = Mapping[str, Sequence[bytes]]  # real files by their media type
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, COUNT, RENDER = "/v1/messages", "/v1/messages/count_tokens", "/v1/chat/completions/render"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
INQUIRIES = (*("/v1/models", "/health", "/ping", "/ready", "/load", "/version", "/metrics", "/openapi.json"),)
MAX_ID = 200  # of a token: every vocabulary has so many that are plain text
PARAMETERS: Json = {
    "type": "object",
    "properties": {"town": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["town"],
}
FUNCTION: Json = {"name": "weather", "description": "The weather.", "parameters": PARAMETERS}
SCHEMA: Json = {
    "type": "object",
    "properties": {"shape": {"enum": ["star", "circle"]}, "count": {"type": "integer"}},
    "required": ["shape", "count"],
    "additionalProperties": False,
}


class Asked(NamedTuple):
    path: str
    body: Json | None = None  # None: GET


class RequestMaker:
    """`damaged` may change the bytes of a medium."""

    def __init__(self, rng: random.Random, media: Media, damaged: Callable[[bytes], bytes]) -> None:
        self._rng, self._media, self._damaged = rng, media, damaged

    def request(self) -> Asked:
        makers = {
            self._chat: 8, self._completion: 3, self._response: 4, self._message: 4, self._count: 1,
            self._render: 1, self._tokenize: 1, self._detokenize: 1, self._inquiry: 2,
        }  # fmt: skip
        (make,) = self._rng.choices(list(makers), list(makers.values()))
        return make()

    # What all of them are made of.

    def _data(self, kind: str) -> str:
        return base64.b64encode(self._damaged(self._rng.choice(self._media[kind]))).decode()

    def _url(self, kind: str) -> str:
        return f"data:{kind};base64,{self._data(kind)}"

    def _words(self) -> str:
        return f"Say {self._rng.randrange(10**6)}."

    def _some(self, groups: Sequence[Json]) -> Json:
        """Up to three groups of fields, which are served with any others of them."""
        found: Json = {}
        for fields in self._rng.sample(groups, self._rng.randint(0, 3)):
            found |= fields
        return found

    # Chats.

    def chat_body(self) -> Json:
        made = {
            "messages": self._turns(),
            "max_tokens": self._rng.randint(1, 4),
            **self._some(self._fields()),
        }
        if made.get("stream") is not True:
            made.pop("stream_options", None)
        return made

    def _chat(self) -> Asked:
        return Asked(CHAT, self.chat_body())

    def _render(self) -> Asked:
        return Asked(RENDER, {"messages": self._turns()})

    def _turns(self) -> list[Json]:
        contents = (
            self._plain, self._plain, self._small_picture, self._two_pictures, self._qwen_picture,
            self._frames, self._frames_in_one_url, self._film,
        )  # fmt: skip
        turns: list[Json] = [{"role": "user", "content": self._rng.choice(contents)()}]
        match self._rng.randrange(5):
            case 0 | 1:
                system: Json = {
                    "role": self._rng.choice(("system", "developer")),
                    "content": [text("Be brief.")],
                }
                answered: Json = {
                    "role": "assistant", "content": "Hello.", "refusal": None, "tool_calls": [],
                    "reasoning_content": self._rng.choice((None, "Hm.")),
                }  # fmt: skip
                turns = [system, {"role": "user", "content": "Hi", "name": "Ann"}, answered, *turns]
            case 2:
                call = {
                    "name": "weather",
                    "arguments": self._rng.choice(('{"town": "Rome"}', {"town": "Rome"})),
                }
                asked = {"id": "c1", "type": "function", "function": call}
                turns = [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": None, "tool_calls": [asked]},
                    {
                        "role": "tool",
                        "tool_call_id": "c1",
                        "content": self._rng.choice(("Sun", [text("Sun")])),
                    },
                    *turns,
                ]
            case _:
                pass
        return turns

    def _picture(self, kind: str, **beside: Any) -> Json:
        return {"type": "image_url", "image_url": {"url": self._url(kind)}, **beside}

    def _plain(self) -> Any:
        words = self._words()
        return self._rng.choice((words, [text(words)], [text(words), text("Be quick.")]))

    def _small_picture(self) -> Any:
        kind = self._rng.choice(("image/png", "image/jpeg", "image/bmp"))
        if self._rng.random() < 0.2:
            return [{"type": "file", "file": {"file_data": self._url(kind), "filename": "x"}}, text("What?")]
        return [self._picture(kind, uuid=f"{self._rng.random()}"), text("What is it?")]

    def _two_pictures(self) -> Any:
        first = self._picture(self._rng.choice(("image/png", "image/jpeg")), detail="low")
        return [first, text("And"), self._picture(self._rng.choice(("image/gif", "image/webp")))]

    def _qwen_picture(self) -> Any:
        return [
            {"type": "image", "image": self._url("image/webp"), "min_pixels": 784, "max_pixels": 28 * 28 * 8},
            text("What?"),
        ]

    def _frames(self) -> Any:
        urls = [
            self._url(self._rng.choice(("image/png", "image/jpeg"))) for _ in range(self._rng.randint(2, 4))
        ]
        return [{"type": "video_url", "video_url": {"url": urls}, "max_frames": 4}, text("What moves?")]

    def _frames_in_one_url(self) -> Any:
        url = "data:video/jpeg;base64," + ",".join(self._data("image/jpeg") for _ in range(3))
        return [{"type": "video_url", "video_url": {"url": url}, "max_frames": 8}, text("What moves?")]

    def _film(self) -> Any:
        return [
            {
                "type": "video", "video": self._url("video/mp4"), "fps": 2, "max_frames": 4,
                "uuid": f"{self._rng.random()}",
            },
            text("What moves?"),
        ]  # fmt: skip

    def _tools(self) -> Json:
        named = {"type": "function", "function": {"name": "weather"}}
        choice = self._rng.choice(("auto", "none", "required", named))
        tools = [{"type": "function", "function": {**FUNCTION, "strict": self._rng.random() < 0.5}}]
        return {"tools": tools, "tool_choice": choice, "parallel_tool_calls": self._rng.random() < 0.5}

    def _structure(self) -> Json:
        named = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
        return self._rng.choice(
            (
                {"response_format": {"type": "text"}, "modalities": ["text"]},
                {"response_format": {"type": "json_object"}},
                {"response_format": named},
                {"structured_outputs": {"regex": "[ab]{1,9}c"}},
                {"structured_outputs": {"choice": ["yes", "no"]}},
                {"guided_json": SCHEMA},
                {"guided_grammar": 'root ::= "a" | "b"'},
            )
        )

    def _thoughts(self) -> Json:
        return self._rng.choice(
            (
                {"chat_template_kwargs": {"enable_thinking": self._rng.random() < 0.5}},
                {"reasoning_effort": self._rng.choice(("none", "low", "high"))},
                {"thinking_token_budget": self._rng.randint(0, 3), "include_reasoning": False},
            )
        )

    def _fields(self) -> list[Json]:
        return [
            {"stream": True, "stream_options": {"include_usage": True}},
            {"stream": True},
            {"n": 2, "seed": 3, "temperature": 0.7, "top_p": 0.5},
            {
                "stop": ["a", "b"], "presence_penalty": 0.5, "frequency_penalty": -0.5,
                "repetition_penalty": 1.1,
            },
            {"stop": "end", "logit_bias": {"5": 1, "7": -100}, "stop_token_ids": [4, 5]},
            {"logprobs": True, "top_logprobs": 3},
            {"top_k": 5, "min_p": 0.1, "min_tokens": 1, "ignore_eos": True},
            {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "functions": []},
            self._tools(),
            self._structure(),
            self._thoughts(),
            {
                "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto",
                "cache_salt": "s", "prompt_cache_key": "k", "return_token_ids": True,
            },
            {"bad_words": ["xyz", "abc"], "skip_special_tokens": False, "include_stop_str_in_output": True},
        ]  # fmt: skip

    # Prompts without a chat.

    def _completion(self) -> Asked:
        ids = [self._rng.randrange(5, MAX_ID) for _ in range(self._rng.randint(1, 9))]
        prompt = self._rng.choice((self._words(), ids, [self._words(), "Hi"], [ids, ids[:1]]))
        fields: list[Json] = [
            {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
            {"logprobs": self._rng.randint(0, 3)},
            {"echo": True},
            {"n": 2, "seed": 3, "temperature": 0.7},
            {"stop": ["a", "b"], "top_k": 5},
            {"return_token_ids": True, "suffix": None},
            self._rng.choice(
                ({"structured_outputs": {"regex": "[ab]{1,9}c"}}, {"guided_choice": ["a", "b"]})
            ),
        ]
        made = {"prompt": prompt, "max_tokens": self._rng.randint(1, 4), **self._some(fields)}
        if "stream" not in made and self._rng.random() < 0.2:
            made |= self._rng.choice(({"best_of": 3}, {"prompt_logprobs": 1}))
        return Asked(COMPLETIONS, made)

    def _tokenize(self) -> Asked:
        given = (
            {"prompt": self._words()},
            {"content": self._words(), "with_pieces": True},
            {"messages": self._turns()},
        )
        return Asked(TOKENIZE, {**self._rng.choice(given), "return_token_strs": self._rng.random() < 0.5})

    def _detokenize(self) -> Asked:
        return Asked(
            DETOKENIZE, {"tokens": [self._rng.randrange(5, MAX_ID) for _ in range(self._rng.randint(1, 9))]}
        )

    # Responses.

    def _response(self) -> Asked:
        picture = {"type": "input_image", "image_url": self._url("image/png"), "detail": "auto"}
        asked = {"type": "input_text", "text": self._words()}
        items: list[Json] = [
            {"role": "user", "content": self._rng.choice((self._words(), [asked], [asked, picture]))}
        ]
        if self._rng.random() < 0.4:
            thought = {
                "type": "reasoning",
                "id": "r",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "Hm."}],
            }
            answered = {"type": "output_text", "text": "Hello.", "annotations": []}
            items = [
                {"role": "user", "content": "Hi"},
                thought,
                {"type": "message", "role": "assistant", "content": [answered], "status": "completed"},
                {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"town": "Rome"}'},
                {
                    "type": "function_call_output",
                    "call_id": "c",
                    "output": self._rng.choice(("Sun", [picture])),
                },
                *items,
            ]
        named = {"type": "function", "name": "weather"}
        fields: list[Json] = [
            {"stream": True},
            {"instructions": "Be brief.", "metadata": {"a": "b"}, "store": self._rng.random() < 0.5},
            {
                "tools": [{"type": "function", **FUNCTION}],
                "tool_choice": self._rng.choice(("auto", "required", named)),
            },
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}, "verbosity": "low"}},
            {"reasoning": {"effort": "low", "summary": "auto"}, "include": ["reasoning.encrypted_content"]},
            {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
            {"temperature": 0.7, "top_p": 0.5, "truncation": "disabled", "background": False},
        ]
        given = self._rng.choice((self._words(), items, items))
        return Asked(
            RESPONSES, {"input": given, "max_output_tokens": self._rng.randint(1, 4), **self._some(fields)}
        )

    # Anthropic's.

    def _message(self) -> Asked:
        fields: list[Json] = [
            {"stream": True},
            {"stop_sequences": ["a", "b"], "temperature": 0.5, "top_k": 5, "top_p": 0.5},
            {"metadata": {"user_id": "u"}, "service_tier": "auto"},
        ]
        made = {**self._anthropic(), "max_tokens": self._rng.randint(1, 4), **self._some(fields)}
        return Asked(MESSAGES, made)

    def _count(self) -> Asked:
        return Asked(COUNT, self._anthropic())

    def _anthropic(self) -> Json:
        kind = self._rng.choice(("image/png", "image/jpeg", "image/webp", "image/gif"))
        source = {"type": "base64", "media_type": kind, "data": self._data(kind)}
        picture = {"type": "image", "source": source, "cache_control": {"type": "ephemeral"}}
        document = {
            "type": "document",
            "source": {"type": "text", "media_type": "text/plain", "data": "A text."},
        }
        content = self._rng.choice(
            (self._words(), [text(self._words())], [picture, text("What?")], [document, text("What?")])
        )
        turns: list[Json] = [{"role": "user", "content": content}]
        if self._rng.random() < 0.4:
            thought = {"type": "thinking", "thinking": "Hm.", "signature": ""}
            call = {"type": "tool_use", "id": "t", "name": "weather", "input": {"town": "Rome"}}
            result = {
                "type": "tool_result",
                "tool_use_id": "t",
                "content": self._rng.choice(("Sun", [picture])),
            }
            turns = [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": [thought, text("I ask."), call]},
                {
                    "role": "user",
                    "content": [result, *(content if isinstance(content, list) else [text(content)])],
                },
            ]
        named = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
        choice = self._rng.choice(({"type": "auto"}, {"type": "any"}, named))
        fields: list[Json] = [
            {"system": self._rng.choice(("Be brief.", [text("Be brief.")]))},
            {"tools": [{"name": "weather", "input_schema": PARAMETERS}], "tool_choice": choice},
            {
                "thinking": self._rng.choice(
                    ({"type": "disabled"}, {"type": "enabled", "budget_tokens": 1024})
                )
            },
            {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        ]
        return {"messages": turns, **self._some(fields)}

    def _inquiry(self) -> Asked:
        return Asked(self._rng.choice(INQUIRIES))
