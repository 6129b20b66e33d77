"""How far the logits of a lossy decoder are from those in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.families import read_model_info
from workers.llm.attention.base import SequencePart
from workers.llm.attention.torch import PagedAttention
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.spec import paged_of
from workers.llm.models.registry import decoder_of
from workers.llm.parallel import TensorParallel
from workers.nn.weights.registry import open_weights

CPU = torch.device("cpu")
NUM_TOKENS = 40


def logits(folder: Path, dtype: torch.dtype, quantization: str = "none") -> Tensor:
    info = read_model_info(folder)
    decoder = decoder_of(info)(info.text, open_weights(folder, dtype, CPU, quantization), TensorParallel())
    attention = PagedAttention(PagedTensors(paged_of(decoder.cache_spec()), 4, 16, dtype, CPU))
    token_ids = torch.arange(300, 300 + NUM_TOKENS)
    step = attention.plan([SequencePart(NUM_TOKENS, 0, (0, 1, 2))])
    hidden = decoder(decoder.embed(token_ids), torch.arange(NUM_TOKENS).expand(3, -1), step)
    return decoder.logits(hidden).double()


@pytest.mark.parametrize(("name", "bound"), [("bfloat16", 0.1), ("int8", 0.25), ("int4", 0.6)])
def test_relative_error_of_the_logits(
    name: str, bound: float, random_checkpoint: Path, record_property: Callable[[str, object], None]
) -> None:
    """Large random weights amplify errors; those of a trained model do less."""
    exact = logits(random_checkpoint, torch.float32)
    is_bfloat16 = name == "bfloat16"
    lossy = (
        logits(random_checkpoint, torch.bfloat16)
        if is_bfloat16
        else logits(random_checkpoint, torch.float32, name)
    )
    error = float((lossy - exact).norm() / exact.norm())
    record_property(f"relative error of the logits in {name}, against float32", error)
    assert 0 < error < bound
