"""What DashInfer-VLM's own clients send, to a server that its own command has started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from launcher.checkpoints import EMBEDDED
from tests.servers import Server
from tests.videos import counting_frames, encode_video

SAMPLES = EMBEDDED / "samples"
# Of its streaming client, and of its benchmark.
STREAMED: dict[str, Any] = {
    "max_completion_tokens": 1024,
    "temperature": 0.1,
    "frequency_penalty": 1.05,
    "stream": True,
}
MEASURED: dict[str, Any] = {"max_tokens": 120, "top_p": 0.01, "temperature": 0.1, "frequency_penalty": 1.05}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for name in ("red-star.png", "number.png", "word.png"):
        (folder / name).write_bytes((SAMPLES / name).read_bytes())
    (folder / "clip.mp4").write_bytes(encode_video(counting_frames(24)))
    return folder


@pytest.fixture(scope="module")
def client(media: Path) -> Iterator[openai.OpenAI]:
    options = [
        "--model",
        str(EMBEDDED / "model"),
        "--max_batch",
        "8",
        "--max_length",
        "2048",
        "--device",
        "cpu",
    ]
    allowed = ["--vision_engine", "transformers", "--allowed-local-media-path", str(media)]
    with Server(*options, *allowed, program="launcher.dashinfer") as server:
        url = server.url.replace("127.0.0.1", "0.0.0.0")  # its client's default
        with openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0, timeout=60) as made:
            yield made


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def streamed(client: openai.OpenAI, *parts: dict[str, Any], **further: Any) -> str:
    """As its client reads a stream: every chunk has a choice."""
    model = client.models.list().data[0].id
    messages: Any = [{"role": "user", "content": list(parts)}]
    chunks = client.chat.completions.create(model=model, messages=messages, **{**STREAMED, **further})
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_the_model_is_named_as_there(client: openai.OpenAI) -> None:
    assert client.models.list().data[0].id == "model"


def test_one_picture_by_its_path(client: openai.OpenAI, media: Path) -> None:
    assert "star" in streamed(client, text("What shape is it?"), image(str(media / "red-star.png")))


def test_several_pictures(client: openai.OpenAI, media: Path) -> None:
    pictures = [image(f"file://{media / name}") for name in ("red-star.png", "number.png", "word.png")]
    assert streamed(client, text("Are these images different?"), *pictures, top_p=0.5)


def test_a_video_with_its_rate(client: openai.OpenAI, media: Path) -> None:
    video = {"type": "video_url", "video_url": {"url": f"file://{media / 'clip.mp4'}", "fps": 2}}
    assert streamed(client, text("What happens in this video?"), video, top_p=0.5)


def test_turns_of_the_benchmark(client: openai.OpenAI, media: Path) -> None:
    """Answers are parts of an assistant's message in the next turn, and all pictures are in the first."""
    pictures = [image(f"file://{media / name}") for name in ("word.png", "number.png", "red-star.png")]
    messages: list[dict[str, Any]] = []
    num_cached = []
    for number in range(3):
        question = text("What shape is in the last picture?")
        messages.append({"role": "user", "content": [question, *(pictures if not number else ())]})
        answer = client.chat.completions.create(model="model", messages=messages, **MEASURED)  # type: ignore[call-overload]
        assert answer.usage.completion_tokens > 0
        assert answer.model == "model"
        num_cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        messages.append({"role": "assistant", "content": [text(answer.choices[0].message.content)]})
    assert num_cached[2] > num_cached[1] > num_cached[0]


def test_a_file_outside_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="outside the allowed folder"):
        streamed(client, text("?"), image("/etc/hostname"))
