"""How far the logits of a lossy decoder are from those in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tools.quantization_loss import logits_of

NUM_TOKENS = 40


def logits(folder: Path, dtype: torch.dtype, quantization: str = "none") -> Tensor:
    token_ids = torch.arange(300, 300 + NUM_TOKENS)
    return logits_of(folder, dtype, quantization, token_ids).found.double()


@pytest.mark.parametrize(("name", "bound"), [("bfloat16", 0.1), ("int8", 0.25), ("int4", 0.6), ("fp8", 0.25)])
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
