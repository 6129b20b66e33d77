"""What an option offers is what the worker can choose: `pipeline/config/` imports no worker."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.config import LlmConfig, VitConfig
from workers.llm.backends import BACKENDS
from workers.llm.cache.kv_formats import FORMATS
from workers.nn.weights.registry import MADE_FORMATS
from workers.vit.engines.choice import ENGINES


@pytest.mark.parametrize(
    ("config", "option", "neutral", "found"),
    [
        (LlmConfig, "attention", "auto", BACKENDS),
        (LlmConfig, "kv_cache_dtype", "auto", FORMATS),
        (LlmConfig, "quantization", "none", MADE_FORMATS),
        (VitConfig, "vit_quantization", "none", MADE_FORMATS),
        (VitConfig, "vit_engine", "auto", ENGINES),
    ],
)
def test_an_option_offers_all_that_there_is(
    config: type[LlmConfig | VitConfig], option: str, neutral: str, found: dict[str, object]
) -> None:  # fmt: skip
    (field,) = (one for one in dataclasses.fields(config) if one.name == option)
    assert set(field.metadata["choices"]) == {neutral, *found}
