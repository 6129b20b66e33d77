"""llm: its command line, in this process."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import checks

MODELS = f"""
- {{model_id: chat, model_name: {checks.MODEL}, api_base: "{checks.URL}", vision: true, supports_schema: true,
   supports_tools: true}}
- {{model_id: unstreamed, model_name: {checks.MODEL}, api_base: "{checks.URL}", can_stream: false,
   vision: true}}
- {{model_id: text, model_name: {checks.MODEL}, api_base: "{checks.URL}", completion: true}}
"""
folder = tempfile.TemporaryDirectory()
os.environ |= {"LLM_USER_PATH": folder.name, "OPENAI_API_KEY": checks.KEY}
Path(folder.name, "extra-openai-models.yaml").write_text(MODELS)

from click.testing import CliRunner  # noqa: E402
from llm.cli import cli  # noqa: E402


def llm(*words: str) -> str:
    done = CliRunner().invoke(cli, list(words))
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def check_picture() -> None:
    for model in ("chat", "unstreamed"):
        checks.red_star(
            llm("-m", model, checks.QUESTION, "-a", str(checks.PICTURE), "-o", "temperature", "0")
        )


def check_usage_and_second_turn() -> None:
    told = llm("-m", "chat", "-u", checks.TEXT_QUESTION)
    assert "Token usage:" in told, told
    assert llm("-c", "What colour is it?")


def check_options() -> None:
    options = [
        ("max_tokens", "20"),
        ("seed", "1"),
        ("top_p", "0.9"),
        ("stop", "."),
        ("presence_penalty", "0.1"),
    ]
    words = [word for name, value in options for word in ("-o", name, value)]
    assert llm("-m", "chat", "Hi", *words)


def check_schema() -> None:
    schema = json.dumps(checks.Shape.model_json_schema())
    told = llm("-m", "chat", "A shape?", "--schema", schema, "-o", "temperature", "0")
    checks.Shape.model_validate_json(told)


def check_json_object() -> None:
    bias = json.dumps(checks.EMPTY_OBJECT)
    assert llm("-m", "chat", "JSON?", "-o", "json_object", "1", "-o", "logit_bias", bias).strip() == "{}"


def check_tools() -> None:
    assert llm("-m", "chat", "What time is it?", "-T", "llm_time")


def check_completion() -> None:
    assert llm("-m", "text", "What is", "-o", "max_tokens", "5")


if __name__ == "__main__":
    checks.run(globals())
