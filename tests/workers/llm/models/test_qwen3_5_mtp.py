"""The head that predicts a further token beside the plain formula, on every number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.families import read_model_info
from tests.checkpoints import make_checkpoint
from tests.mtp import MtpReference
from tests.workers.llm.models.conftest import OnRanks
from workers.llm.attention.base import SequencePart
from workers.llm.backends import choose_backend
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.spec import paged_of
from workers.llm.models.qwen3_5 import Qwen3_5Decoder
from workers.llm.parallel import TensorParallel
from workers.nn.weights.registry import open_weights

CPU = torch.device("cpu")
NUM_PAIRS, BLOCK = 40, 4


@pytest.mark.parametrize(
    ("family", "size", "has_whole_experts"),
    [("qwen3_5", 1, False), ("qwen3_5", 2, False), ("qwen3_5_moe", 2, False), ("qwen3_5_moe", 2, True)],
)
def test_ranks_together_compute_the_formula(
    family: str, size: int, has_whole_experts: bool, on_ranks: OnRanks, tmp_path: Path
) -> None:
    """In two parts, of which the second attends to the first."""
    folder = make_checkpoint(tmp_path, family)
    info = read_model_info(folder)
    generator = torch.Generator().manual_seed(3)
    embedded, hidden = torch.randn(2, NUM_PAIRS, info.text.hidden_size, generator=generator)
    positions = torch.arange(NUM_PAIRS) + torch.tensor([[0], [3], [7]]) * (torch.arange(NUM_PAIRS) > 9)

    def run(parallel: TensorParallel) -> Tensor:
        decoder = Qwen3_5Decoder(info.text, open_weights(folder, torch.float32, CPU), parallel)
        num_layers = len(decoder.attention_layers)
        decoder.load_mtp(open_weights(folder, torch.float32, CPU))
        assert len(decoder.attention_layers) == num_layers + 1
        assert decoder.mtp is not None
        spec = paged_of(decoder.cache_spec())
        assert len(spec) == num_layers + 1
        cache = PagedTensors(spec, NUM_PAIRS // BLOCK, BLOCK, torch.float32, CPU)
        attention, found = choose_backend("torch", CPU).attention(cache), []
        for start, stop in ((0, 17), (17, NUM_PAIRS)):
            step = attention.plan([SequencePart(stop - start, start, range(NUM_PAIRS // BLOCK))])
            part = slice(start, stop)
            found.append(decoder.mtp(embedded[part], hidden[part], positions[:, part], step))
        return decoder.logits(torch.cat(found))

    formula = MtpReference(folder)
    wanted = formula.logits(formula.hidden(embedded, hidden, positions))
    assert float(wanted.std()) > 0.5
    for logits in on_ranks(size, has_whole_experts, run):
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
