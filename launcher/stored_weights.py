"""The weights of a checkpoint, before any process starts: how they are stored, how large they are, and which
are not served."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import Config
from pipeline.families.quantization import check_quantization


def check_weights(config: Config, folder: Path) -> None:
    """Raises ValueError for weights that are quantised in a way that is not served, or that an option would
    quantise again."""
    found = check_quantization(folder)
    if found is None:
        return
    chosen = {"quantization": config.llm.quantization, "vit_quantization": config.vit.vit_quantization}
    for option, name in chosen.items():
        if name not in (None, "none"):
            raise ValueError(
                f"{option} {name!r} is for dense weights, but those of {str(folder)!r} are quantised by "
                f"{found.method!r} already ({found.place}): leave the option out"
            )


def refuse_gguf(model: str, files: list[str]) -> None:
    """Raises ValueError where a model is a GGUF file, or a folder of these alone."""
    has_safetensors = any(name.endswith(".safetensors") for name in files)
    if model.lower().endswith(".gguf") or (
        not has_safetensors and any(name.endswith(".gguf") for name in files)
    ):
        raise ValueError(
            f"model {model!r} is in GGUF, the format of llama.cpp, which is not served: give the folder or "
            "the hub's name of the same model in safetensors (its FP8, AWQ, GPTQ or unquantised files)"
        )


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
