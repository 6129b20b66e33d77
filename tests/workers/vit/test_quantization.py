"""Towers in 8 and 4 bits: how far their features are from those in float32, and what is quantised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import Config, LlmConfig, VitConfig
from pipeline.families import ModelInfo, read_model_info
from tests.workers.vit.tiny_towers import TOWERS, TinyTower, make_jobs, plain_tower
from tools.quantization_loss import features_of, in_process_of_its_own
from tools.random_checkpoint import make_checkpoint
from workers.nn.loader import no_progress
from workers.nn.native.quantized_panels import quantized_kernels
from workers.nn.weights.base import Linear
from workers.nn.weights.int4 import make_int4_linear
from workers.nn.weights.int8 import Int8Linear, PanelLinear, make_int8_linear
from workers.vit.engines.choice import EngineSpec, choose_engine
from workers.vit.engines.torch import TorchEngine
from workers.vit.models.base import Encoder
from workers.vit.slices import SliceLimit

CPU = torch.device("cpu")
MAKE = {**TOWERS, "no deepstack": plain_tower}
# Large random weights amplify errors; those of a trained tower do less (docs/quantization.md).
BOUNDS = {"bfloat16": 0.02, "int8": 0.05, "int4": 0.4}
MAKERS = {"int8": make_int8_linear, "int4": make_int4_linear}


@pytest.fixture(scope="module", params=MAKE)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyTower:
    return MAKE[request.param](tmp_path_factory.mktemp("tower"))


def features(tiny: TinyTower, encoder: Encoder, is_in_blocks: bool = False) -> torch.Tensor:
    jobs = make_jobs(tiny.info, dtype=encoder.dtype)
    TorchEngine(encoder, after_work=(lambda: None) if is_in_blocks else None).encode(jobs)
    return torch.cat([job.output for job in jobs]).double()


@pytest.mark.parametrize("name", BOUNDS)
def test_relative_error_of_the_features(
    name: str, tiny: TinyTower, record_property: Callable[[str, object], None]
) -> None:
    exact = features(tiny, tiny.encoder())
    is_bfloat16 = name == "bfloat16"
    encoder = tiny.encoder(torch.bfloat16) if is_bfloat16 else tiny.encoder(quantization=name)
    error = float((features(tiny, encoder) - exact).norm() / exact.norm())
    record_property(f"relative error of a tiny tower's features in {name}, against float32", error)
    assert 0 < error < BOUNDS[name]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_blocks_the_features_are_the_same(name: str, dtype: torch.dtype, tiny: TinyTower) -> None:
    """A patch has a scale of its own: rows beside it change nothing."""
    encoder = tiny.encoder(dtype, quantization=name)
    assert torch.equal(features(tiny, encoder), features(tiny, encoder, is_in_blocks=True))


def linears(of: object, path: str = "") -> Iterator[tuple[str, Linear]]:
    """All layers of an encoder, by the names of attributes."""
    if isinstance(of, Linear):
        yield path, of
    elif isinstance(of, list | dict):
        for name, part in of.items() if isinstance(of, dict) else enumerate(of):
            yield from linears(part, f"{path}.{name}")
    elif type(of).__module__.startswith("workers.vit.models"):
        for name, part in vars(of).items():
            yield from linears(part, f"{path}.{name}")


@pytest.mark.parametrize("name", MAKERS)
def test_all_layers_but_the_first_are_quantised(name: str, tiny: TinyTower) -> None:
    expected = type(MAKERS[name](torch.rand(64, 64)))
    found = dict(linears(tiny.encoder(quantization=name)))
    others = {path for path, layer in found.items() if not isinstance(layer, expected)}
    assert others == {".patch_embed"}
    num_blocks, num_mergers = tiny.info.depth, tiny.info.embedding_width // 40
    assert len(found) == 1 + 4 * num_blocks + 2 * num_mergers


def test_weights_take_less_memory(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "vision")
    picture = [np.zeros((56, 56, 3), np.uint8)]
    sizes = {
        name: in_process_of_its_own(features_of, tmp_path, torch.bfloat16, name, picture).weights
        for name in ("none", *MAKERS)
    }
    assert sizes["int8"] < 0.6 * sizes["none"]
    assert sizes["int4"] < (0.35 if quantized_kernels() else 0.6) * sizes["none"]


def make_spec(info: ModelInfo, device: torch.device, cache: Path) -> EngineSpec:
    return EngineSpec(
        info=info, folder=info.folder, dtype=torch.float32, device=device, num_threads=1, cache=cache,
        progress=no_progress, limit=SliceLimit(4096, None), quantization="int8",
    )  # fmt: skip


def test_what_engines_are_for_quantised_weights(random_checkpoint: Path, tmp_path: Path) -> None:
    info = read_model_info(random_checkpoint)
    spec = make_spec(info, CPU, tmp_path)
    for name in ("auto", "torch"):
        engine = choose_engine(name, spec)
        assert isinstance(engine, TorchEngine)
        quantised = [
            path for path, layer in linears(engine.encoder) if isinstance(layer, PanelLinear | Int8Linear)
        ]
        assert len(quantised) == 4 * info.vision.depth + 2
    for name in ("onnxruntime", "tensorrt"):
        with pytest.raises(ValueError, match=f"'{name}' computes dense weights, not int8: take torch"):
            choose_engine(name, spec)


@pytest.mark.parametrize(
    ("decoder", "tower", "expected"),
    [("none", None, "none"), ("int8", None, "int8"), ("int8", "none", "none"), ("none", "int4", "int4")],
)
def test_the_tower_is_quantised_as_the_decoder_unless_told(
    decoder: str, tower: str | None, expected: str
) -> None:
    config = Config(llm=LlmConfig(quantization=decoder), vit=VitConfig(vit_quantization=tower))
    assert config.vit_quantization == expected
