"""A toy decoder, one of whose layers keeps a state: through engine, scheduler, cache and runner as they are.

Its reference computes each text from its beginning, in one piece and without any cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config import Config, LlmConfig, ModelConfig
from pipeline.families import read_model_info
from pipeline.transport.ends import Subscription
from pipeline.wire.clients import PROTOCOL_VERSION, Hello, TokenOutputs, Welcome
from pipeline.wire.generation import GenerateRequest
from pipeline.wire.packing import pack_int32, unpack_int32
from pipeline.wire.sampling import SamplingParams
from tests.engine_rig import few_splits
from tests.fakes import LLM_0, PREPROCESS, FakePublisher, FakeSink
from workers.llm.attention.base import AttentionStep, SequencePart
from workers.llm.attention.torch import PagedAttention
from workers.llm.backends import choose_backend
from workers.llm.cache.manager import CacheManager
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.spec import CacheSpec, State, paged_of
from workers.llm.cache.state_tensors import StepStates
from workers.llm.engine import Engine, Links
from workers.llm.model_runner import ModelRunner
from workers.llm.models.base import Features
from workers.llm.models.qwen2 import Qwen2Decoder
from workers.llm.parallel import TensorParallel
from workers.llm.scheduler import Scheduler
from workers.nn.weights.registry import open_weights

CLIENT = b"c" * 16
CPU = torch.device("cpu")
NUM_TOKENS = 12
PROMPTS = [[5 + (7 * number + step * step) % 90 for step in range(9 + 4 * number)] for number in range(4)]


class ToyDecoder(Qwen2Decoder):
    """Qwen2's layers and one more, whose state is what it has seen, older things fading."""

    def cache_spec(self) -> CacheSpec:
        return [*super().cache_spec(), State((self.info.hidden_size,), torch.float32)]

    def __call__(
        self,
        x: Tensor,
        positions: Tensor,
        attention: AttentionStep,
        features: Features | None = None,
        states: StepStates | None = None,
    ) -> Tensor:
        hidden = super().__call__(x, positions, attention, features)
        assert states is not None
        (memory,) = states.tensors
        if states.counts is None:  # each sequence has one token: all of it on the device
            seen = memory[states.slots] * 0.99 + hidden
            memory[states.slots] = seen
            return hidden + seen
        parts: list[Tensor] = []
        for slot, rows in zip(states.slots.tolist(), hidden.split(list(states.counts)), strict=True):
            for row in rows:
                memory[slot] = memory[slot] * 0.99 + row
                parts.append(row + memory[slot])
        return torch.stack(parts)


def make_decoder(folder: Path, attention: str) -> ToyDecoder:
    info, backend = read_model_info(folder), choose_backend(attention, CPU)
    weights = open_weights(folder, torch.float32, CPU)
    return ToyDecoder(info.text, weights, TensorParallel(), backend.kernels)


@torch.inference_mode()
def reference(decoder: ToyDecoder, prompt: Sequence[int]) -> list[int]:
    tokens, layers = list(prompt), paged_of(decoder.cache_spec())
    for _ in range(NUM_TOKENS):
        length = len(tokens)
        attention = PagedAttention(PagedTensors(layers, 8, 16, torch.float32, CPU))
        states = StepStates([torch.zeros(1, decoder.info.hidden_size)], torch.tensor([0]), [length], [0])
        step = attention.plan([SequencePart(length, 0, range(8))])
        x, positions = decoder.embed(torch.tensor(tokens)), torch.arange(length).expand(3, -1)
        hidden = decoder(x, positions, step, states=states)
        tokens.append(int(decoder.logits(hidden[-1:]).argmax()))
    return tokens[len(prompt) :]


class ToyRig:
    """An engine with the toy decoder; every text is submitted at once."""

    def __init__(self, folder: Path, attention: str, budget: int, num_blocks: int, has_overlap: bool) -> None:
        info = read_model_info(folder)
        llm = LlmConfig(block_size=4, attention=attention, max_num_seqs=4)
        config = Config(model=ModelConfig(dtype="float32"), llm=llm)
        decoder = make_decoder(folder, attention)
        runner = ModelRunner(info, config, decoder, choose_backend(attention, CPU), CPU, TensorParallel())
        with few_splits():
            runner.open_cache(num_blocks, 200)
        cache = CacheManager.of_size(num_blocks, 4, 4, has_states=True)
        self.num_rounds = 0
        self.scheduler, self.publisher = Scheduler(cache, budget, ()), FakePublisher()
        welcome = Welcome(
            sender=LLM_0, epoch=1, protocol=PROTOCOL_VERSION, model_folder="", tokenizer_hash=b"",
            model_name="m", max_model_len=200, max_requests=9, max_request_bytes=9,
        )  # fmt: skip
        links = Links(publish=self.publisher, feedback=FakeSink(), vits=[])
        self.engine = Engine(
            {"sender": LLM_0, "epoch": 1},
            self.scheduler,
            runner,
            welcome,
            links,
            has_overlap=has_overlap,
        )
        self.engine.on_subscriptions([Subscription(CLIENT, True)], 0.0)
        self.engine.handle(Hello(client_id=CLIENT, protocol=PROTOCOL_VERSION), 0.0)

    def answer(self, prompts: Sequence[Sequence[int]], num_tokens: int = NUM_TOKENS) -> list[list[int]]:
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, seed=1)
        self.num_rounds += 1
        for number, prompt in enumerate(prompts):
            request = GenerateRequest(
                sender=PREPROCESS, epoch=1, client_id=CLIENT,
                request_id=f"{self.num_rounds}.{number}", attempt=1, arrival=number + 1,
                prompt_token_ids=pack_int32(prompt), positions=pack_int32([*range(len(prompt))] * 3),
                position_delta=0, items=(), sampling=sampling,
            )  # fmt: skip
            self.engine.handle(request, 0.0)
        while self.engine.step(0.0):
            self.engine.check_integrity()
        tokens: list[list[int]] = [[] for _ in prompts]
        for message in self.publisher.take(TokenOutputs):
            for output in message.outputs:
                tokens[int(output.request_id.split(".")[1])] += unpack_int32(output.new_token_ids).tolist()
                assert output.num_cached_tokens == 0, "no state is kept, so no prefix can be used"
        return tokens


@pytest.fixture(scope="module")
def expected(random_checkpoint: Path) -> list[list[int]]:
    decoder = make_decoder(random_checkpoint, "torch")
    return [reference(decoder, prompt) for prompt in PROMPTS]


def test_the_state_matters(random_checkpoint: Path, expected: list[list[int]]) -> None:
    """Else equal tokens would prove nothing."""
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    decoder = make_decoder(random_checkpoint, "torch")
    assert reference(decoder, PROMPTS[0][4:]) != expected[0]


@pytest.mark.parametrize("has_overlap", [False, True], ids=["alone", "overlap"])
@pytest.mark.parametrize("budget", [4, 7, 512])
def test_chunks_and_company_do_not_change_it(
    budget: int,
    has_overlap: bool,
    random_checkpoint: Path,
    expected: list[list[int]],
) -> None:
    rig = ToyRig(random_checkpoint, "torch", budget, 100, has_overlap)
    assert rig.answer(PROMPTS) == expected
    assert rig.answer(PROMPTS) == expected, "slots are used again, and equal prefixes are computed again"


@pytest.mark.parametrize("has_overlap", [False, True], ids=["alone", "overlap"])
def test_whoever_is_preempted_starts_over_with_its_state(
    has_overlap: bool,
    random_checkpoint: Path,
    expected: list[list[int]],
) -> None:
    num_blocks = sum(-(-len(prompt) // 4) for prompt in PROMPTS) + len(PROMPTS)
    rig = ToyRig(random_checkpoint, "torch", 16, num_blocks, has_overlap)
    assert rig.answer(PROMPTS) == expected
    assert rig.scheduler.num_preemptions > 0


@pytest.mark.interpreter
def test_the_way_of_a_gpu_keeps_states_too(random_checkpoint: Path, expected: list[list[int]]) -> None:
    """Padded decode batches, whose further rows have a slot of their own."""
    rig = ToyRig(random_checkpoint, "triton", 64, 100, has_overlap=True)
    assert rig.answer(PROMPTS[:3], 5) == [tokens[:5] for tokens in expected[:3]]
