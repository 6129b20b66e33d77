"""A byte-level BPE with Qwen's special tokens, in which every id is a word, so that every token is a streamed
event.

The merges are the embedded model's. Its words come first; then there are words that no text has, up to the
special tokens, and behind these up to the size of the embeddings. With a large vocabulary the special tokens
have the hub's ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.checkpoints import EMBEDDED
from tools.random_checkpoint.shapes import NEW_VOCABULARY, Shape

NUM_WORDS = 4082  # of the embedded model's tokenizer
FIRST_SPECIAL_ID, NEW_FIRST_SPECIAL_ID = 151_643, 248_044
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# Matched as one token too, but kept in decoded text.
FURTHER_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
# Twelve, and a length of 262144 tokens, where nothing is said.
NUM_FURTHER = {"qwen2_vl": 0, "qwen2_5_vl": 8}
MAX_LENGTHS = {"qwen2_vl": 32_768, "qwen2_5_vl": 131_072}
TEMPLATES = {
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5",
}


def first_special_id(shape: Shape) -> int:
    if shape.has_small_vocabulary:
        return NUM_WORDS
    return NEW_FIRST_SPECIAL_ID if shape.vocab_size == NEW_VOCABULARY else FIRST_SPECIAL_ID


def chat_template(family: str) -> str:
    return (Path(__file__).parent / "templates" / f"{TEMPLATES[family]}.jinja").read_text()


def write_tokenizer(folder: Path, shape: Shape) -> None:
    """`tokenizer.json`, its settings, and the chat template in both places in which the hub has it."""
    added = _added_tokens(shape)
    content = json.loads((EMBEDDED / "model" / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    assert len(words) == NUM_WORDS
    words.update({token["content"]: token["id"] for token in added})  # else they are numbered anew
    taken = set(words.values())
    words.update({f"\u0120w{number}": number for number in range(shape.vocab_size) if number not in taken})
    content["added_tokens"] = added
    # The embedded model takes each Chinese character by itself, which Qwen's do not.
    del content["pre_tokenizer"]["pretokenizers"][0]
    template = chat_template(shape.family)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(_settings(shape, added, template), indent=2))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}, indent=2))


def _added_tokens(shape: Shape) -> list[dict[str, Any]]:
    names = SPECIAL_TOKENS + FURTHER_TOKENS[: NUM_FURTHER.get(shape.family, len(FURTHER_TOKENS))]
    return [
        {
            "id": first_special_id(shape) + number,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": name in SPECIAL_TOKENS,
        }
        for number, name in enumerate(names)
    ]


def _settings(shape: Shape, added: list[dict[str, Any]], template: str) -> dict[str, Any]:
    decoder = {str(token["id"]): {**token} for token in added}
    for token in decoder.values():
        del token["id"]
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": MAX_LENGTHS.get(shape.family, 262_144),
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
