"""How far the logits of a lossy decoder are from those in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.families import read_model_info
from workers.llm.attention.torch import PagedAttention, Span
from workers.llm.models.qwen2_vl import Decoder
from workers.llm.parallel import TensorParallel
from workers.nn.layers import make_int8_linear, make_linear
from workers.nn.loader import Checkpoint

CPU = torch.device("cpu")
NUM_TOKENS = 40


def logits(folder: Path, dtype: torch.dtype, linear: Callable[..., object]) -> Tensor:
    info = read_model_info(folder).text
    decoder = Decoder(info, Checkpoint(folder, dtype, CPU), TensorParallel(), linear)
    attention = PagedAttention(info.num_layers, 4, 16, info.num_kv_heads, info.head_dim, dtype, CPU)
    token_ids = torch.arange(300, 300 + NUM_TOKENS)
    layout = attention.plan([Span(NUM_TOKENS, 0, (0, 1, 2))])
    hidden = decoder(decoder.embed(token_ids), torch.arange(NUM_TOKENS).expand(3, -1), attention, layout)
    return decoder.logits(hidden).double()


@pytest.mark.parametrize(("name", "bound"), [("bfloat16", 0.1), ("int8", 0.25)])
def test_relative_error_of_the_logits(
    name: str, bound: float, random_checkpoint: Path, record_property: Callable[[str, object], None]
) -> None:
    """Large random weights amplify errors; those of a trained model do less."""
    exact = logits(random_checkpoint, torch.float32, make_linear)
    lossy = (
        logits(random_checkpoint, torch.bfloat16, make_linear)
        if name == "bfloat16"
        else logits(random_checkpoint, torch.float32, make_int8_linear)
    )
    error = float((lossy - exact).norm() / exact.norm())
    record_property(f"relative error of the logits in {name}, against float32", error)
    assert 0 < error < bound
