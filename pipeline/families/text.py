"""The text model's numbers, by the names that transformers gives them: families with M-RoPE share this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from pipeline.families.base import TextInfo
from pipeline.families.files import CheckpointFiles

ROPE_THETA = 1_000_000.0
Info = TypeVar("Info", bound=TextInfo)


def read_text(
    files: CheckpointFiles,
    make: Callable[..., Info],
    served_layers: Sequence[str] = ("full_attention",),
    mlp_size: str = "intermediate_size",
) -> Info:
    """`make` is a family's class of `TextInfo`, which may have been given the family's own numbers.

    `served_layers`: the kinds of layers that the family's decoder computes. `mlp_size`: the key of the
    dense MLPs' size. Raises ValueError for a missing key, and for what no decoder computes.
    """
    text, config, rope = files.text, files.config, files.rope
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in ("default", "mrope"):
        what = f"has rotary embeddings of the unknown type {rope_type!r}; served is 'default' only"
        raise ValueError(f"model {str(files.folder)!r} {what}")
    if text.get("use_sliding_window") or config.get("use_sliding_window"):
        raise ValueError(f"model {str(files.folder)!r} uses a sliding attention window, which is not served")
    if odd := set(text.get("layer_types") or ()) - set(served_layers):
        what = f"has layers of the kinds {sorted(odd)}; served is {' and '.join(served_layers)} only"
        raise ValueError(f"model {str(files.folder)!r} {what}")
    files.expect(text, "hidden_act", "silu")
    hidden_size = files.integer(text, "hidden_size")
    num_heads = files.integer(text, "num_attention_heads")
    time, height, width = files.need(rope, "mrope_section")
    theta = rope.get("rope_theta") or text.get("rope_theta") or config.get("rope_theta")
    return make(
        hidden_size=hidden_size,
        intermediate_size=files.integer(text, mlp_size),
        num_layers=files.integer(text, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=int(text.get("num_key_value_heads") or num_heads),
        head_dim=int(text.get("head_dim") or hidden_size // num_heads),
        vocab_size=files.integer(text, "vocab_size"),
        # 1e-5 in transformers' class, 1e-6 in the published files.
        rms_norm_eps=float(files.need(text, "rms_norm_eps")),
        rope_theta=float(theta or ROPE_THETA),
        mrope_section=(int(time), int(height), int(width)),
        max_position_embeddings=files.integer(text, "max_position_embeddings"),
        tie_word_embeddings=_is_tied(files),
    )


def _is_tied(files: CheckpointFiles) -> bool:
    """The top level wins. An output layer that the checkpoint stores counts in any case."""
    for section in (files.config, files.text):
        if section.get("tie_word_embeddings") is not None:
            return bool(section["tie_word_embeddings"])
    return False
