"""Checkpoints for tests: random weights, other dimensions than the embedded model, the embedded model's
tokenizer.

The weights are large enough that greedy text is lively: with the usual 0.02 it repeats one token whatever the
picture shows, and a test on that proves nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from launcher.checkpoints import EMBEDDED

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TEXT = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0, "mrope_section": [2, 3, 3]},
}
VISION = {"depth": 3, "embed_dim": 96, "num_heads": 3, "hidden_size": 192, "mlp_ratio": 3}


def make_checkpoint(
    folder: Path,
    seed: int = 0,
    scale: float = 5.0,
    processor: dict[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A random Qwen2-VL in `folder`, as Hugging Face saves it, its weights in `dtype`."""
    embedded = json.loads((EMBEDDED / "model" / "config.json").read_text())
    text = embedded["text_config"]
    ids = {name: text[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    tokens = {
        name: embedded[name]
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    }
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config={**TEXT, **ids}, vision_config=VISION, **tokens)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
            elif "norm" not in name and "ln_q" not in name:
                parameter.normal_(0, 0.2)
    model.to(dtype).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(EMBEDDED / "model" / name, folder / name)
    settings = json.loads((EMBEDDED / "model" / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**settings, **(processor or {"min_pixels": 28 * 28, "max_pixels": 560 * 560})})
    )
    return folder
