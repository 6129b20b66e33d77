from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors import safe_open

from pipeline.config import Config, ModelConfig
from pipeline.families import ModelInfo
from tests.toy_family.checkpoint import LANGUAGE, TOKENS, make_toy
from tests.toy_family.decoder import ToyDecoder
from tests.toy_family.family import ToyFamily
from tests.toy_family.reference import Reference
from workers.llm.attention.base import SequencePart
from workers.llm.backends import choose_backend
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.spec import Paged, State, paged_of, states_of
from workers.llm.cache.state_tensors import StateTensors
from workers.llm.model_runner import ModelRunner
from workers.llm.models.base import Features
from workers.llm.parallel import TensorParallel
from workers.nn.loader import no_progress
from workers.nn.weights.registry import open_weights

CPU = torch.device("cpu")
LENGTH, FIRST, NUM_PADS = 20, 4, 6  # tokens of a prompt, and where placeholders are


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    return ToyFamily().read(make_toy(tmp_path_factory.mktemp("toy") / "model", True), None, None)


@pytest.mark.parametrize("name", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
@torch.inference_mode()
def test_every_backend_computes_what_the_reference_does(name: str, info: ModelInfo) -> None:
    """The norms of heads, the second half of embeddings, the state; fused kernels as well."""
    backend = choose_backend(name, CPU)
    decoder = ToyDecoder(
        info.text, open_weights(info.folder, torch.float32, CPU), TensorParallel(), backend.kernels
    )
    tokens = [(31 * number) % 4000 for number in range(LENGTH)]
    tokens[FIRST : FIRST + NUM_PADS] = [TOKENS["picture_token_id"]] * NUM_PADS
    positions = torch.stack([torch.arange(LENGTH) * axis % 17 for axis in (1, 3, 5)])
    width, generator = LANGUAGE["width"], torch.Generator().manual_seed(0)
    embeddings = torch.randn(NUM_PADS, 2 * width, generator=generator)
    expected = Reference(info.folder).logits(
        tokens, [(t, h, w) for t, h, w in positions.T.tolist()], embeddings
    )

    spec = decoder.cache_spec()
    states = StateTensors(states_of(spec), 1, torch.float32, CPU).of_step(torch.tensor([0]), [LENGTH], [0])
    step = backend.attention(PagedTensors(paged_of(spec), 4, 16, torch.float32, CPU)).plan(
        [SequencePart(LENGTH, 0, [2, 0])]
    )
    rows = torch.arange(FIRST, FIRST + NUM_PADS)
    x = decoder.embed(torch.tensor(tokens))
    x[rows] = embeddings[:, :width]
    hidden = decoder(x, positions, step, Features(rows, embeddings[:, None, width:]), states)
    torch.testing.assert_close(decoder.logits(hidden[-1:])[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_each_rank_keeps_a_part(tp_size: int, info: ModelInfo) -> None:
    state = State((48 // tp_size,), torch.float32)
    assert ToyDecoder.spec_of(info.text, tp_size) == [Paged(2 // tp_size, 16)] * 3 + [state]


def test_embeddings_that_do_not_fit_the_decoder_are_refused_at_its_start(info: ModelInfo) -> None:
    """Not at the first picture."""
    narrow = dataclasses.replace(info, vision=dataclasses.replace(info.vision, embedding_width=48))
    config = Config(model=ModelConfig(dtype="float32"))
    with pytest.raises(ValueError, match="embeddings are 48 wide, the decoder takes 96"):
        ModelRunner.load(narrow, config, info.folder, CPU, TensorParallel(), no_progress)


def test_progress_counts_bytes_of_its_own_tensors(info: ModelInfo) -> None:
    """A decoder says how their names begin."""
    told: list[tuple[int, int]] = []
    config = Config(model=ModelConfig(dtype="float32"))
    ModelRunner.load(
        info, config, info.folder, CPU, TensorParallel(), lambda done, total: told.append((done, total))
    )
    with safe_open(info.folder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("mind.")]  # noqa: SIM118
        num_bytes = sum(file.get_tensor(name).nbytes for name in names)
    assert {total for _, total in told} == {num_bytes}
