"""Qwen3.5, 3.6 and 3.8, dense and with experts: pictures and videos as Qwen3-VL sees them, without deepstack;
most layers of the text keep a state in the place of keys and values (Gated DeltaNet).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.families.base import ModelInfo, TextInfo
from pipeline.families.files import CheckpointFiles
from pipeline.families.info import model_info
from pipeline.families.qwen3_vl import (
    ExpertsInfo,
    Qwen3VisionInfo,
    Qwen3VL,
    make_experts,
    read_tower,
    read_video,
)
from pipeline.families.text import read_text
from pipeline.families.vision import with_server_limits

FULL, LINEAR = "full_attention", "linear_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaNetInfo:
    """The layers that keep a state. The state of a value head is a matrix [key_dim, value_dim]."""

    num_key_heads: int
    num_value_heads: int  # consecutive ones share a key head
    key_dim: int
    value_dim: int
    num_taps: int  # of the convolution over time: of the token itself, and of those before it


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3_5TextInfo(TextInfo):
    """`intermediate_size` is that of the shared expert where there are experts."""

    full_layers: tuple[int, ...]  # with attention to all tokens; all others keep a state
    rotary_dim: int  # numbers of a head, from its first, that positions turn
    delta_net: DeltaNetInfo
    experts: ExpertsInfo | None  # None: each layer has one dense MLP
    num_mtp_layers: int  # of the head that predicts a further token; 0: there is none


class Qwen3_5(Qwen3VL):
    model_type = "qwen3_5"
    decoder = "workers.llm.models.qwen3_5"

    def read(self, folder: Path, min_pixels: int | None, max_pixels: int | None) -> ModelInfo:
        files = CheckpointFiles(folder)
        vision = with_server_limits(files, _read_vision(files), min_pixels, max_pixels)
        text = _read_text(files, vision, self.read_experts(files))
        # The text model's own list lacks the end of a turn.
        end_tokens = files.all_eos_token_ids()
        return model_info(self, files, text, vision, read_video(files, vision), end_tokens)


class Qwen3_5Moe(Qwen3_5):
    model_type = "qwen3_5_moe"

    def read_experts(self, files: CheckpointFiles) -> ExpertsInfo | None:
        text = files.text
        for name, served in (("norm_topk_prob", True), ("decoder_sparse_step", 1), ("mlp_only_layers", [])):
            files.expect(text, name, served)
        num_experts, num_chosen = (
            files.integer(text, name) for name in ("num_experts", "num_experts_per_tok")
        )
        layers = tuple(range(files.integer(text, "num_hidden_layers")))
        return make_experts(files, num_experts, num_chosen, layers)


FAMILIES = (Qwen3_5(), Qwen3_5Moe())


def _read_vision(files: CheckpointFiles) -> Qwen3VisionInfo:
    files.expect(files.vision, "deepstack_visual_indexes", [])
    return read_tower(files, ())


def _read_text(
    files: CheckpointFiles, vision: Qwen3VisionInfo, experts: ExpertsInfo | None
) -> Qwen3_5TextInfo:  # fmt: skip
    text = files.text
    for section, name, served in (
        (text, "attention_bias", False),
        (text, "attn_output_gate", True),
        (text, "mamba_ssm_dtype", "float32"),
        (text, "mtp_use_dedicated_embeddings", False),
        (files.rope, "mrope_interleaved", True),
    ):
        files.expect(section, name, served)
    # The class of transformers has numbers of one published size.
    head_dim = files.integer(text, "head_dim")
    if files.rope.get("rope_theta") is None:
        files.need(text, "rope_theta")
    make = partial(
        Qwen3_5TextInfo,
        full_layers=_full_layers(files),
        rotary_dim=_rotary_dim(files, head_dim),
        delta_net=_read_delta_net(files),
        experts=experts,
        num_mtp_layers=int(text.get("mtp_num_hidden_layers") or 0),
    )
    mlp_size = "intermediate_size" if experts is None else "shared_expert_intermediate_size"
    info = read_text(files, make, (FULL, LINEAR), mlp_size)
    if vision.embedding_width != info.hidden_size:
        what = f"has vision embeddings of {vision.embedding_width} numbers; the text has {info.hidden_size}"
        raise ValueError(f"model {str(files.folder)!r} {what}")
    return info


def _full_layers(files: CheckpointFiles) -> tuple[int, ...]:
    """By name, or every n-th."""
    text = files.text
    num_layers = files.integer(text, "num_hidden_layers")
    kinds = text.get("layer_types")
    if kinds is None:
        interval = files.integer(text, "full_attention_interval")
        return tuple(range(interval - 1, num_layers, interval))
    if len(kinds) != num_layers:
        what = f"has {len(kinds)} layer_types, and num_hidden_layers = {num_layers}"
        raise ValueError(f"model {str(files.folder)!r} {what}")
    return tuple(number for number, kind in enumerate(kinds) if kind == FULL)


def _rotary_dim(files: CheckpointFiles, head_dim: int) -> int:
    has_it = files.rope.get("partial_rotary_factor") is not None
    factor = float(files.need(files.rope if has_it else files.text, "partial_rotary_factor"))
    dim = int(head_dim * factor)
    if not 0 < dim <= head_dim or dim % 2:
        what = f"has partial_rotary_factor = {factor}, which turns {dim} numbers of a head of {head_dim}"
        raise ValueError(f"model {str(files.folder)!r} {what}")
    return dim


def _read_delta_net(files: CheckpointFiles) -> DeltaNetInfo:
    names = (
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_conv_kernel_dim",
    )
    key_heads, value_heads, key_dim, value_dim, num_taps = (files.integer(files.text, name) for name in names)
    if key_heads < 1 or value_heads % key_heads:
        what = f"has linear_num_value_heads = {value_heads}, no multiple of {key_heads} key heads"
        raise ValueError(f"model {str(files.folder)!r} {what}")
    return DeltaNetInfo(
        num_key_heads=key_heads,
        num_value_heads=value_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        num_taps=num_taps,
    )
