"""Quantised weights that are not served: one sentence with the key, the file, and what to take instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.families.quantization import CHECKS, check_quantization, stored_quantization
from workers.nn.weights.registry import STORED_FORMATS

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
MIXED = {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "W4A8"}}
FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


def compressed(weights: dict[str, Any] = INT4, **others: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": group},
        **others,
    }


REFUSED: list[tuple[Any, str]] = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"by 'bitsandbytes'.*_method\): known are"),
    ({"load_in_8bit": True}, "by 'bitsandbytes'"),
    ({"quant_method": "mxfp4"}, "by 'mxfp4', numbers of 4 bits in floating point"),
    ({"quant_method": "aqlm"}, "known are auto-round, awq, compressed-tensors, fp8, gptq, modelopt;"),
    ({"bits": 4, "shape": 1}, "by a method that nothing names, with the keys bits, shape"),
    ({"quant_method": "fp8", "weight_block_size": 128}, r"size 128.*config\.weight_block_size\)"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "with fmt 'e5m2', where e4m3 is served"),
    ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, "with scale_fmt 'ue8m0'"),
    ("awq", r"by 'awq', which are no settings \(config\.json, key quantization_config\)"),
    ({"quant_method": None, "bits": 4}, "by a method that nothing names, with the keys bits, quant_method"),
    ({"quant_method": "fp8", "ignored_layers": "lm_head"}, "ignored_layers 'lm_head', where a list of names"),
    ({"quant_method": "fp8", "ignored_layers": [None]}, r"ignored_layers \[None\], where a list of names"),
    ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"weight_block_size \[0, 128\]"),
    (compressed(ignore=["re:*visual"]), r"with '\*visual' in ignore, which is no regular expression"),
    (compressed(config_groups=[]) | {"config_groups": ["a"]}, r"with config_groups \['a'\]"),
    ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:*": {}}}, r"'\*' in dynamic, which is no regular"),
    ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:a": None}}, "with dynamic .* settings by names"),
    ({"quant_method": "auto-round", "bits": 4, "extra_config": {"*a": {}}}, r"'\*a' in extra_config"),
    (compressed(config_groups={"g": {"weights": INT4, "targets": ["re:*a"]}}), r"'\*a' in targets, which"),
    ({"quant_method": "awq", "bits": 8}, r"with bits 8, where 4 is served \(config\.json, .*\.bits\)"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "with version 'gemv', where gemm is served"),
    ({"quant_method": "gptq", "bits": 3}, "with bits 3, where 4 or 8 is served"),
    ({"quant_method": "gptq", "bits": 2}, "with bits 2, where 4 or 8 is served"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "with checkpoint_format 'marlin'"),
    ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "Marlin's order"),
    ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {"bits": 2}}}, r"bits 2.*config\.dynamic\)"),
    ({"quant_method": "auto-round", "packing_format": "auto_round:fp8"}, "packing_format 'auto_round:fp8'"),
    ({"quant_method": "auto-round", "bits": 2}, "with bits 2"),
    ({"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp"}, "with data_type 'mx_fp'"),
    (compressed(FP4, format="nvfp4-pack-quantized"), r"as 'nvfp4.*config_groups\.g\.format\)"),
    (compressed(FP4, format="mxfp4-pack-quantized"), "as 'mxfp4-pack-quantized'"),
    (compressed(FP4), "with 4 bits of type 'float'"),
    (compressed({**INT4, "num_bits": 2}), "with 2 bits of type 'int'"),
    (compressed(sparsity_config={"format": "sparse-24-bitmask"}), r"and sparse.*config\.sparsity_config\)"),
    (compressed(transform_config={"config_groups": {}}), "behind rotations"),
    (compressed(quantization_status="frozen"), "the status is 'frozen'"),
    (compressed(config_groups={"W4A16": ["Linear"]}), "with a group"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"as NVFP4, where FP8.*config\.quant_algo\)"),
    ({"quant_algo": "MIXED_PRECISION", "quantized_layers": MIXED}, "as W4A8"),
]  # fmt: skip


def write(folder: Path, settings: Any, **others: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings, **others}))


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_refused(settings: Any, words: str, tmp_path: Path) -> None:
    write(tmp_path, settings)
    with pytest.raises(ValueError, match=words) as refusal:
        check_quantization(tmp_path)
    sentence = str(refusal.value)
    assert sentence.startswith(f"the weights of model {str(tmp_path)!r} are quantised ")
    assert sentence.endswith("take the model's FP8, AWQ, GPTQ or unquantised files instead")
    assert "\n" not in sentence


def test_mlx_is_refused(tmp_path: Path) -> None:
    settings = {"group_size": 64, "bits": 4, "mode": "affine"}
    for config in ({"quantization": settings}, {"quantization": settings, "quantization_config": settings}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"by MLX, for Macs \(config\.json, key quantization\)"):
            check_quantization(tmp_path)


def test_what_modelopt_writes_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for algorithm, is_served in (("FP8", True), ("NVFP4", False)):
        content = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm}}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
        if is_served:
            found = check_quantization(tmp_path)
            assert found is not None
            assert found.method == "modelopt"
        else:
            with pytest.raises(ValueError, match=r"\(hf_quant_config\.json\.quantization\.quant_algo\)"):
                check_quantization(tmp_path)


def test_an_older_key_of_compressed_tensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"compression_config": compressed()}))
    found = check_quantization(tmp_path)
    assert found is not None
    assert found.method == "compressed-tensors"


def test_what_is_not_quantised(tmp_path: Path) -> None:
    assert stored_quantization(tmp_path) is None
    write(tmp_path, {})
    assert check_quantization(tmp_path) is None


def test_every_format_is_checked() -> None:
    assert CHECKS.keys() == STORED_FORMATS.keys()
