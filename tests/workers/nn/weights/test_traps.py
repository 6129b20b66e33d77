"""What makers get wrong, or each in a way of their own: read by what the file has, or refused with the
tensor's name; never garbage."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.dequantised import of_gptq
from tests.workers.nn.weights.test_stored import Stored, assert_same, random_matrix, tensors_of
from tools.random_checkpoint.quantized import RECIPES
from workers.llm.parallel import TensorParallel, share_experts
from workers.nn.weights.exceptions import Names, usual
from workers.nn.weights.grouped import GroupedLinear
from workers.nn.weights.registry import open_weights
from workers.nn.weights.shard import WHOLE, Shard

CPU = torch.device("cpu")
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


@pytest.mark.parametrize(
    "wrapper", ["model.language_model.", "model.", "thinker.model.", "language_model.model."]
)
@pytest.mark.parametrize("in_file", ["model.language_model.", "model."])
def test_exceptions_match_with_every_prefix(
    wrapper: str, in_file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, dense = RECIPES["fp8-block"](16), random_matrix(16, 32)
    tensors = tensors_of(recipe, f"{in_file}layers.0.self_attn.q_proj", random_matrix(16, 32))
    tensors[f"{in_file}layers.0.self_attn.k_proj.weight"] = dense
    kept = [f"{wrapper}layers.0.self_attn.k_proj"]
    weights = Stored(tmp_path, {**FP8, "modules_to_not_convert": kept}, tensors).weights()
    assert isinstance(weights.column((Q,), (WHOLE,)), GroupedLinear)
    assert_same(weights.column((K,), (WHOLE,)), dense)
    assert not caplog.records


@pytest.mark.parametrize(
    ("entry", "module", "is_matched"),
    [
        ("visual", "visual.blocks.0.attn.qkv", True),
        ("model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv", True),
        ("model.visual.blocks.1.attn.qkv", "visual.blocks.10.attn.qkv", False),
        ("re:.*visual.*", "visual.merger.mlp.0", True),
        ("re:model.language_model.layers.0.*", "model.layers.0.mlp.up_proj", True),
        ("model.visual*", "visual.blocks.0.mlp.fc1", True),
        ("*self_attn*", "model.layers.0.self_attn.q_proj", True),
        ("model.layers.1*", "model.layers.0.mlp.up_proj", False),
        ("mlp.gate", "model.layers.0.mlp.gate", True),
        ("mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("thinker.lm_head", "lm_head", True),
        ("mtp", "mtp.fc", True),
    ],
)
def test_names_in_lists(entry: str, module: str, is_matched: bool) -> None:
    assert Names([entry]).match(module) == is_matched


def test_names_that_the_loader_has() -> None:
    assert usual("thinker.model.language_model.layers.3") == "model.layers.3"
    assert usual("model.visual.merger") == "visual.merger"
    assert usual("lm_head") == "lm_head"


@pytest.mark.parametrize("module", ["visual.blocks.0.attn.qkv", "mtp.fc"])
@pytest.mark.parametrize("format", ["awq", "fp8-block", "compressed-fp8", "modelopt-fp8"])
def test_a_list_that_lacks_what_is_dense(
    format: str, module: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, dense = RECIPES[format](16), random_matrix(16, 32)
    settings = recipe.settings([])
    for key in ("modules_to_not_convert", "ignore"):
        if key in settings:
            settings[key] = []
    tensors = tensors_of(recipe, Q, random_matrix(16, 32)) | {f"{module}.weight": dense}
    weights = Stored(tmp_path, settings, tensors).weights()
    for _ in range(2):
        assert_same(weights.column((module,), (WHOLE,)), dense)
    (record,) = caplog.records
    assert f"{module} is not quantised in the checkpoint's files" in record.message


def test_a_list_that_has_what_is_quantised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = RECIPES["fp8-block"](16)
    tensors = tensors_of(recipe, Q, random_matrix(16, 32)) | tensors_of(recipe, K, random_matrix(16, 32, 1))
    stored = Stored(tmp_path, {**FP8, "modules_to_not_convert": [Q, K]}, tensors)
    weights = stored.weights()
    assert_same(weights.column((Q, K), (WHOLE, WHOLE)), torch.cat([stored.matrix(Q), stored.matrix(K)]))
    (record,) = caplog.records
    assert f"{Q} is quantised in the checkpoint's files" in record.message


def float8(*shape: int) -> Tensor:
    return torch.ones(shape).to(torch.float8_e4m3fn)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
INT32 = {"dtype": torch.int32}
REFUSED: dict[str, tuple[Mapping[str, Any] | None, dict[str, Tensor], str]] = {
    "float8 without scales": (FP8, {"weight": float8(16, 16)}, r"'{q}\.weight' is of type F8_E4M3, but "),
    "float8 without settings": (None, {"weight": float8(16, 16)}, r"'{q}\.weight' .* F8_E4M3: it is quant"),
    "integers without settings": (
        None, {"weight": torch.ones(4, 4, dtype=torch.int8)}, r"'{q}\.weight' .* of type I8",
    ),
    "integers for floats": (
        FP8, {"weight": torch.ones(16, 8, dtype=torch.uint8), "weight_scale_inv": torch.ones(1, 1)},
        r"'{q}\.weight' is of type U8",
    ),
    "quantised in name only": (
        FP8, {"weight": torch.ones(16, 16), "weight_scale_inv": torch.ones(1, 1)},
        r"'{q}\.weight' is of type F32",
    ),
    "scales of other sizes": (
        FP8, {"weight": float8(16, 48), "weight_scale_inv": torch.ones(1, 2)},
        r"'{q}\.weight_scale_inv' has the shape \(1, 2\), which does not fit",
    ),
    "scales in float8": (
        FP8, {"weight": float8(16, 16), "weight_scale_inv": float8(1, 1)},
        r"'{q}\.weight_scale_inv' is of type F8",
    ),
    "a factor of inputs": (
        FP8, {"weight": float8(16, 16), "weight_scale_inv": torch.ones(1), "pre_quant_scale": torch.ones(16)},
        r"'{q}\.pre_quant_scale' changes the layer",
    ),
    "a second scale": (
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {"weight": float8(16, 16), "weight_scale": torch.ones(1), "weight_scale_2": torch.ones(1)},
        r"'{q}\.weight_scale_2' changes the layer",
    ),
    "scales in whole numbers": (
        AWQ,
        {
            "qweight": torch.ones(16, 2, **INT32), "scales": torch.ones(1, 16, **INT32),
            "qzeros": torch.ones(1, 2, **INT32),
        },
        r"'{q}\.scales' is of type I32, which is no scale's",
    ),
    "packed without settings": (
        None, {"qweight": torch.ones(2, 16, **INT32)}, r"no tensor '{q}\.weight', but .*qweight",
    ),
    "zeros missing": (
        GPTQ, {"qweight": torch.ones(2, 16, **INT32), "scales": torch.ones(1, 16)},
        r"'{q}\.qzeros' is missing",
    ),
    "three bits": (
        GPTQ,
        {
            "qweight": torch.ones(3, 32, **INT32), "scales": torch.ones(1, 32),
            "qzeros": torch.ones(1, 3, **INT32),
        },
        r"{q} is not packed as GPTQ",
    ),
    "groups out of range": (
        GPTQ,
        {
            "qweight": torch.ones(2, 8, **INT32), "scales": torch.ones(1, 8),
            "qzeros": torch.ones(1, 1, **INT32), "g_idx": torch.arange(16, **INT32),
        },
        r"groups of {q}",
    ),
    "GPTQ called AWQ": (
        AWQ,
        {
            "qweight": torch.ones(2, 16, **INT32), "scales": torch.ones(1, 16),
            "qzeros": torch.ones(1, 2, **INT32),
        },
        r"{q} is not packed as AWQ",
    ),
    "NVFP4 within": (
        COMPRESSED, {"weight_packed": torch.ones(16, 8, dtype=torch.uint8), "weight_scale": float8(16, 1)},
        r"'{q}\.weight_packed' is of type U8, not I32",
    ),
    "a shape that is not": (
        COMPRESSED,
        {
            "weight_packed": torch.ones(16, 2, **INT32), "weight_scale": torch.ones(16, 1),
            "weight_shape": torch.tensor([16, 40]),
        },
        r"{q} is not packed as 4 or 8 bits",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_sure_is_refused_with_the_tensors_name(name: str, tmp_path: Path) -> None:
    settings, tensors, words = REFUSED[name]
    stored = Stored(tmp_path, settings, {f"{Q}.{part}": tensor for part, tensor in tensors.items()})
    with pytest.raises(ValueError, match=words.replace("{q}", Q.replace(".", r"\."))):
        stored.weights().column((Q,), (WHOLE,))


@pytest.mark.parametrize("name", ["norm.weight", "A_log"])
def test_no_other_tensor_may_be_quantised(name: str, tmp_path: Path) -> None:
    weights = Stored(tmp_path, FP8, {name: float8(4)}).weights()
    with pytest.raises(ValueError, match=f"tensor '{name}' of the checkpoint is of type F8_E4M3"):
        weights.tensor(name)
    with pytest.raises(ValueError, match=f"tensor '{name}' of the checkpoint is of type F8_E4M3"):
        weights.wide_tensor(name)


def test_scales_keep_their_digits_in_a_model_of_another_type(tmp_path: Path) -> None:
    """Scales in float16 below a bfloat16 model."""
    tensors = tensors_of(RECIPES["awq"](16), Q, random_matrix(16, 32))
    Stored(tmp_path, AWQ, tensors)
    linear = open_weights(tmp_path, torch.bfloat16, CPU).column((Q,), (WHOLE,))
    assert isinstance(linear, GroupedLinear)
    assert torch.equal(linear.weight.scales.t(), tensors[f"{Q}.scales"].float())


@pytest.mark.parametrize("format", ["awq", "gptq", "gptq-int8"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_sizes_padded_in_the_file(format: str, num_ranks: int, tmp_path: Path) -> None:
    """Qwen2-VL-72B's intermediate size is 29568, in its files of 4 and 8 bits 29696: zeros make it a multiple
    of 128 for each of several ranks, and its config.json says so. Where it does not, nothing is loaded."""
    up, down = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    recipe, size, padded = RECIPES[format](32), 96, 128
    tensors = tensors_of(
        recipe, up, torch.nn.functional.pad(random_matrix(size, 64), (0, 0, 0, padded - size))
    )
    tensors |= tensors_of(recipe, down, torch.nn.functional.pad(random_matrix(16, size), (0, padded - size)))
    stored = Stored(tmp_path, recipe.settings([]), tensors)
    weights, x, total = stored.weights(), random_matrix(3, 64), torch.zeros(3, 16)
    for rank in range(num_ranks):
        shard = Shard.split(padded, rank, num_ranks)
        total += weights.row(down, shard)(weights.column((up,), (shard,))(x))
    torch.testing.assert_close(
        total, x @ stored.matrix(up).t() @ stored.matrix(down).t(), rtol=1e-4, atol=1e-3
    )
    shard = Shard.split(size, 0, num_ranks)
    with pytest.raises(
        ValueError, match=rf"outputs of '{up}\.qweight' are 128 in .*, by its config\.json 96"
    ):
        weights.column((up,), (shard,))
    with pytest.raises(
        ValueError, match=rf"inputs of '{down}\.qweight' are 128 in .*, by its config\.json 96"
    ):
        weights.row(down, shard)


@pytest.mark.parametrize("format", ["fp8-block", "gptq", "awq", None])
def test_layers_of_another_width_than_the_model_are_refused(format: str | None, tmp_path: Path) -> None:
    """A kernel would read, or write, beyond what it is given."""
    out, experts = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.experts"
    down = f"{experts}.0.down_proj"
    shapes = {
        Q: (16, 64),
        out: (64, 16),
        f"{experts}.0.gate_proj": (16, 64),
        f"{experts}.0.up_proj": (16, 64),
    }
    matrices = {name: random_matrix(*shape) for name, shape in {**shapes, down: (64, 16)}.items()}
    if format is None:
        settings, tensors = None, {f"{name}.weight": matrix for name, matrix in matrices.items()}
    else:
        recipe = RECIPES[format](16)
        made = [tensors_of(recipe, name, matrix) for name, matrix in matrices.items()]
        settings, tensors = recipe.settings([]), {name: one for part in made for name, one in part.items()}
    weights = Stored(tmp_path, settings, tensors).weights()
    of_width = weights.of_width(64)
    assert of_width.column((Q,), (WHOLE,)).in_features == 64
    assert of_width.under("model").row("layers.0.self_attn.o_proj", WHOLE).out_features == 64
    other = weights.of_width(48)
    with pytest.raises(ValueError, match=rf"inputs of '{Q}' are 64 in .* by its config\.json 48"):
        other.column((Q,), (WHOLE,))
    with pytest.raises(ValueError, match=rf"outputs of '{out}' are 64 in .* by its config\.json 48"):
        other.row(out, WHOLE)
    shard = share_experts(1, 48, 16, TensorParallel())
    with pytest.raises(ValueError, match=r"hidden size of .*gate_proj.* is 64 .* by its config\.json 48"):
        weights.experts(experts, shard, None)


def test_a_bias_of_another_size_is_refused(tmp_path: Path) -> None:
    tensors = tensors_of(RECIPES["awq"](16), Q, random_matrix(16, 32))
    weights = Stored(tmp_path, AWQ, tensors).weights()
    with pytest.raises(ValueError, match="have 16 outputs, but a bias of 8 numbers"):
        weights.column((Q,), (WHOLE,), torch.ones(8))


@pytest.mark.parametrize(("num_inputs", "num_groups"), [(72, 3), (64, 2), (96, 3)])
def test_the_last_group_of_compressed_tensors_may_be_shorter(
    num_inputs: int, num_groups: int, tmp_path: Path
) -> None:
    """Their number alone does not tell the size: 72 inputs in 3 groups may be of 32 or of 24."""
    size, generator = 32, torch.Generator().manual_seed(1)
    numbers = torch.randint(0, 16, (8, num_inputs), generator=generator)
    scales = torch.rand(8, num_groups, generator=generator) + 0.5
    shifts = torch.arange(8) * 4
    tensors = {
        "weight_packed": (numbers.unflatten(1, (-1, 8)) << shifts).sum(-1).to(torch.int32),
        "weight_scale": scales, "weight_shape": torch.tensor([8, num_inputs]),
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": size}}
    settings = {**COMPRESSED, "config_groups": {"g": group}}
    stored = Stored(tmp_path, settings, {f"{Q}.{name}": tensor for name, tensor in tensors.items()})
    expected = (numbers - 8) * scales.repeat_interleave(size, dim=1)[:, :num_inputs]
    assert_same(stored.weights().column((Q,), (WHOLE,)), expected)


def test_a_dense_file_of_other_sizes_is_refused(tmp_path: Path) -> None:
    save_file({f"{Q}.weight": random_matrix(128, 8)}, tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(
        ValueError, match=r"axis 0 of .*q_proj\.weight' are 128 in .*, by its config\.json 96"
    ):
        open_weights(tmp_path, torch.float32, CPU).column((Q,), (Shard.split(96, 0, 2),))


@pytest.mark.parametrize("format", ["awq", "gptq", "gptq-int8", "compressed-int4-asym"])
@pytest.mark.parametrize(("shape", "size"), [((16, 64), 64), ((8, 32), 32), ((32, 8), 8), ((8, 8), 8)])
def test_a_single_group_or_word(format: str, shape: tuple[int, int], size: int, tmp_path: Path) -> None:
    recipe = RECIPES[format](size)
    stored = Stored(tmp_path, recipe.settings([]), tensors_of(recipe, Q, random_matrix(*shape)))
    assert_same(stored.weights().column((Q,), (WHOLE,)), stored.matrix(Q))


def test_settings_that_are_null_are_those_that_are_missing(tmp_path: Path) -> None:
    recipe = RECIPES["gptq"](64)
    tensors = tensors_of(recipe, Q, random_matrix(16, 64))
    del tensors[f"{Q}.g_idx"]
    settings = recipe.settings([]) | {"group_size": None, "checkpoint_format": None, "dynamic": None}
    stored = Stored(tmp_path, settings, tensors)
    expected = of_gptq(
        {name.removeprefix(f"{Q}."): one for name, one in tensors.items()}
        | {"g_idx": torch.zeros(64, dtype=torch.int32)},
        4,
        1,
    )
    assert_same(stored.weights().column((Q,), (WHOLE,)), expected)


def test_what_has_no_effect_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    scheme = {"num_bits": 8, "type": "float"}
    for settings in (
        {**COMPRESSED, "kv_cache_scheme": scheme},
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": scheme},
    ):
        Stored(tmp_path, settings, {"norm.weight": torch.ones(2)}).weights()
    assert sum("KV cache" in record.message for record in caplog.records) == 2


def test_a_bias_that_the_model_lacks(tmp_path: Path) -> None:
    """AutoGPTQ's files have biases of 0 for all layers."""
    down = "model.layers.0.mlp.down_proj"
    tensors = tensors_of(RECIPES["gptq"](16), down, random_matrix(16, 32))
    stored = Stored(tmp_path, GPTQ, tensors | {f"{down}.bias": torch.zeros(16)})
    assert_same(stored.weights().row(down, WHOLE), stored.matrix(down))
    stored = Stored(tmp_path, GPTQ, tensors | {f"{down}.bias": torch.ones(16)})
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.down_proj\.bias' is not 0"):
        stored.weights().row(down, WHOLE)
