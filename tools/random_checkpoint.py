"""Checkpoints of the true shapes with random weights: how fast they run does not depend on the values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from launcher.checkpoints import EMBEDDED

VOCABULARY = 151_936
SHARD_BYTES = 4 << 30
SPREAD = 0.02  # of the weights, as transformers starts a training with
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "text": {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        "vision": {"depth": 2, "embed_dim": 160, "num_heads": 2, "hidden_size": 256},
    },
    # The encoder of 0.3b beside a language model that costs next to nothing: what is timed is the ViTs' work.
    "vision": {
        "text": {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        "vision": {"depth": 16, "embed_dim": 640, "num_heads": 8, "hidden_size": 256},
    },
    "0.3b": {
        "text": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
        },
        "vision": {"depth": 16, "embed_dim": 640, "num_heads": 8, "hidden_size": 768},
    },
    "2b": {
        "text": {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
        },
        "vision": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536},
    },
    "7b": {
        "text": {
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        "vision": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 3584},
    },
}
TIED = ("tiny", "vision", "0.3b", "2b")  # input and output embeddings are one


PICTURES = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}


def make_checkpoint(folder: Path, shape: str, device: torch.device | None = None) -> None:
    """A random Qwen2-VL in bfloat16, made on `device`, with a tokenizer in which every id is a word, so that
    every token is a streamed event."""
    embedded = json.loads((EMBEDDED / "model" / "config.json").read_text())
    ids = {
        name: embedded[name]
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    }
    text = {
        **SHAPES[shape]["text"], "vocab_size": VOCABULARY, "max_position_embeddings": 32_768,
        "bos_token_id": 0, "eos_token_id": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": _mrope_section(SHAPES[shape]["text"]),
        },
        "tie_word_embeddings": shape in TIED,
    }  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=SHAPES[shape]["vision"],
        tie_word_embeddings=shape in TIED,
        dtype="bfloat16",
        **ids,
    )
    config.architectures = ["Qwen2VLForConditionalGeneration"]
    config.save_pretrained(folder)
    _save_weights(folder, config, device or torch.device("cpu"))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED / "model" / name, folder / name)
    (folder / "preprocessor_config.json").write_text(json.dumps(PICTURES))
    tokenizer = json.loads((EMBEDDED / "model" / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    # else they are numbered anew behind the rest
    vocab.update({token["content"]: token["id"] for token in tokenizer["added_tokens"]})
    vocab.update({f"\u0120w{token}": token for token in range(1 + max(vocab.values()), VOCABULARY)})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _mrope_section(text: dict[str, Any]) -> list[int]:
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    spatial = 3 * half // 8
    return [half - 2 * spatial, spatial, spatial]


def _save_weights(folder: Path, config: Qwen2VLConfig, device: torch.device) -> None:
    with torch.device("meta"):
        shapes = {
            name: tensor.shape
            for name, tensor in Qwen2VLForConditionalGeneration(config).state_dict().items()
        }
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    places: dict[str, str] = {}
    for number, shard in enumerate(_shards(shapes, torch.Generator(device).manual_seed(0))):
        name = f"model-{number:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _shards(shapes: dict[str, torch.Size], generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
        if "norm" in name or "ln_q" in name:
            tensor.fill_(float(name.endswith("weight")))
        else:
            tensor.normal_(0, SPREAD, generator=generator)
        shard[name] = tensor.cpu()
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            yield shard
            shard = {}
    yield shard
