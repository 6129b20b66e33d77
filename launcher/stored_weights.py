"""The weights of a checkpoint, before any process starts: how they are stored, how large they are, and which
are not served."""

from __future__ import annotations

from pathlib import Path

from pipeline.adapters.tensors import check_whole, read_header
from pipeline.config import Config
from pipeline.families.files import read_json
from pipeline.families.quantization import StoredQuantization, check_quantization

INDEX = "model.safetensors.index.json"
FETCH_AGAIN = "fetch it again"
IN_FP8 = ("fp8", "modelopt")  # methods whose weights all are


def check_weights(config: Config, folder: Path) -> None:
    """Raises ValueError for weights that are quantised in a way that is not served, or that an option would
    quantise again, or whose activations cannot be as an option wants them."""
    found = check_quantization(folder)
    check_activations(config, found)
    if found is None:
        return
    chosen = {"quantization": config.llm.quantization, "vit_quantization": config.vit.vit_quantization}
    for option, name in chosen.items():
        if name not in (None, "none"):
            raise ValueError(
                f"{option} {name!r} is for dense weights, but those of {str(folder)!r} are quantised by "
                f"{found.method!r} already ({found.place}): leave the option out"
            )


def check_activations(config: Config, found: StoredQuantization | None) -> None:
    """Raises ValueError where `--activation-quantization` would have no effect, or no kernel."""
    wanted = config.llm.activation_quantization
    if wanted == "auto":
        return
    made = {config.llm.quantization, config.vit_quantization} - {"none"}
    if found is None and not made:
        raise ValueError(
            f"activation_quantization {wanted!r} is for weights that are quantised, and those of this model "
            "are not: leave the option out, or take --quantization as well"
        )
    if wanted == "int8" and ("fp8" in made or (found is not None and found.method in IN_FP8)):
        raise ValueError(
            "activation_quantization 'int8' is for weights that are whole numbers, and those of this model "
            "are in FP8: leave the option out"
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


def check_files(folder: Path) -> None:
    """Raises ValueError where a file of weights is missing, or is not whole: a download that was interrupted
    is the usual reason."""
    index, paths = folder / INDEX, sorted(folder.glob("*.safetensors"))
    if index.is_file():  # other files are not read
        named = set(read_json(index).get("weight_map", {}).values())
        paths = [folder / name for name in sorted(named)]
        if missing := sorted(name for name in named if not (folder / name).is_file()):
            others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise ValueError(
                f"model {str(folder)!r} lacks {missing[0]}{others}, which {INDEX} names: {FETCH_AGAIN}"
            )
    for path in paths:
        try:
            check_whole(path, read_header(path))
        except ValueError as error:
            raise ValueError(f"model {str(folder)!r}: {error}: {FETCH_AGAIN}") from None


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
