"""A toy rule that needs each token on the host, through engine, scheduler and runner as they are.

Its reference computes a text in one piece, and looks at every token before it chooses the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from pipeline.config import Config, LlmConfig, ModelConfig
from pipeline.families import read_model_info
from pipeline.transport.ends import Subscription
from pipeline.wire.clients import PROTOCOL_VERSION, ChoiceProgress, Hello, TokenOutputs, Welcome
from pipeline.wire.generation import GenerateRequest
from pipeline.wire.packing import pack_int32, unpack_int32
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.steps import StepPlan, StepsMessage, TokenMasks
from tests.engine_rig import few_splits
from tests.fakes import LLM_0, PREPROCESS, FakePublisher, FakeSink
from tests.workers.llm.speculation.guesses import drafter_of
from workers.llm.attention.base import SequencePart
from workers.llm.attention.torch import PagedAttention
from workers.llm.cache.manager import CacheManager
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.spec import paged_of, states_of
from workers.llm.engine import Engine, Links
from workers.llm.follower import Follower
from workers.llm.matcher_starts import MatcherStarts
from workers.llm.model_runner import ModelRunner
from workers.llm.parallel import TensorParallel
from workers.llm.sampling.matching import Mask
from workers.llm.sampling.tokens import TokensSoFar
from workers.llm.scheduler import Scheduler
from workers.llm.speculation.drafter import Drafter
from workers.llm.step_result import LaunchedStep

CLIENT = b"c" * 16
CPU = torch.device("cpu")
NUM_TOKENS = 12
FREE = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, seed=1)
RULED = msgspec.structs.replace(FREE, min_p=0.25)  # which changes nothing else: the best token is chosen
DRAWN = msgspec.structs.replace(RULED, temperature=1.0)
PROMPTS = {
    name: [5 + (7 * number + step * step) % 90 for step in range(9 + 4 * number)]
    for number, name in enumerate(("ruled", "free", "ruled too", "free too"))
}
PARAMS = {"ruled": RULED, "free": FREE, "ruled too": RULED, "free too": FREE}


def allowed_after(token: int) -> list[int]:
    """Three tokens, other ones behind each token."""
    return [(3 * token + 1 + 40 * number) % 150 for number in range(3)]


class ToyMatcher:
    is_over = False

    def __init__(self, last: int, vocab_size: int, log: list[str]) -> None:
        self.last, self._vocab_size, self._log = last, vocab_size, log

    def accept(self, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            assert token in allowed_after(self.last)
            self.last = token
        self._log.append("accept")

    def allowed(self) -> Mask:
        return self._mask(self.last)

    def allowed_behind(self, drafts: Sequence[int]) -> list[Mask]:
        places = enumerate(zip([self.last, *drafts], drafts, strict=False))
        stop = next((place for place, (last, one) in places if one not in allowed_after(last)), len(drafts))
        return [self._mask(draft) for draft in drafts[:stop]]

    def _mask(self, last: int) -> Mask:
        bits = np.zeros(self._vocab_size, dtype=np.bool_)
        bits[allowed_after(last)] = True
        return np.packbits(bits, bitorder="little")


class ToyRule:
    """For whoever asks for this min_p. Notes what it was started with."""

    def __init__(self, vocab_size: int, log: list[str]) -> None:
        self._vocab_size, self._log = vocab_size, log
        self.outputs: list[list[int]] = []

    def is_asked(self, params: SamplingParams) -> bool:
        return params.min_p == RULED.min_p

    def start(self, params: SamplingParams, tokens: TokensSoFar, compiled: bytes | memoryview) -> ToyMatcher:
        self.outputs.append(tokens.output.tolist())
        last = int([*tokens.prompt, *tokens.output][-1])
        return ToyMatcher(last, self._vocab_size, self._log)


class LoggedRunner(ModelRunner):
    log: list[str]

    def launch(self, plan: StepPlan) -> LaunchedStep:
        launched = super().launch(plan)
        self.log.append("launch")
        return launched

    def choose(self, masks: Sequence[bytes]) -> None:
        self.log.append("choose")
        super().choose(masks)


def make_runner(folder: Path, num_blocks: int, attention: str, speculative: str = "none") -> LoggedRunner:
    llm = LlmConfig(block_size=4, attention=attention, max_num_seqs=4, speculative=speculative)
    config = Config(model=ModelConfig(dtype="float32"), llm=llm)
    info = read_model_info(folder)
    runner = LoggedRunner.load(info, config, folder, CPU, TensorParallel(), lambda done, total: None)
    assert isinstance(runner, LoggedRunner)
    with few_splits():
        runner.open_cache(num_blocks, 200, num_drafts=16)
    runner.log = []
    return runner


class Rig:
    """An engine with the toy rule, and another rank that hears its steps only."""

    def __init__(
        self,
        folder: Path,
        budget: int = 512,
        num_blocks: int = 100,
        has_overlap: bool = True,
        attention: str = "torch",
        starts: MatcherStarts | None = None,
        drafter: Drafter | None = None,
        speculative: str = "none",
    ) -> None:
        """Another `starts` than the toy rule's may be given."""
        info = read_model_info(folder)
        self.runner, self.other = (make_runner(folder, num_blocks, attention, speculative) for _ in range(2))
        self.log = self.runner.log
        self.follower = Follower(self.other, lambda is_wide: None, lambda pool_id, epoch: None)
        self.rule = ToyRule(info.text.vocab_size, self.log)
        self.steps: list[StepsMessage] = []
        decoder = self.runner.decoder
        cache = CacheManager.of_size(num_blocks, 4, 4, bool(states_of(decoder.cache_spec())))
        self.scheduler = Scheduler(
            cache, budget, info.eos_token_ids, drafter=drafter, prefill_multiple=decoder.prefill_multiple
        )
        self.publisher = FakePublisher()
        welcome = Welcome(
            sender=LLM_0, epoch=1, protocol=PROTOCOL_VERSION, model_folder="", tokenizer_hash=b"",
            model_name="m", max_model_len=200, max_requests=9, max_request_bytes=9,
        )  # fmt: skip
        links = Links(publish=self.publisher, feedback=FakeSink(), vits=[], publish_step=self.publish_step)
        self.engine = Engine(
            {"sender": LLM_0, "epoch": 1}, self.scheduler, self.runner, welcome, links,
            has_overlap=has_overlap, matcher_starts=starts or MatcherStarts([self.rule]),
        )  # fmt: skip
        self.engine.on_subscriptions([Subscription(CLIENT, True)], 0.0)
        self.engine.handle(Hello(client_id=CLIENT, protocol=PROTOCOL_VERSION), 0.0)
        self.tokens: dict[str, list[int]] = {}

    def publish_step(self, message: StepsMessage) -> bool:
        received = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=StepsMessage)
        self.steps.append(received)
        self.follower.handle(received)
        return True

    def submit(
        self,
        name: str,
        params: SamplingParams,
        prompt: Sequence[int],
        output: Sequence[int] = (),
        compiled: bytes = b"",
    ) -> None:
        self.tokens[name] = list(output)
        request = GenerateRequest(
            sender=PREPROCESS, epoch=1, client_id=CLIENT, request_id=name, attempt=1 + bool(output),
            arrival=len(self.tokens), prompt_token_ids=pack_int32(prompt),
            positions=pack_int32([*range(len(prompt))] * 3), position_delta=0, items=(), sampling=params,
            choices=(ChoiceProgress(pack_int32(output)),),
        )  # fmt: skip
        self.engine.handle(request, 0.0, [memoryview(compiled)])

    def step(self) -> bool:
        is_busy = self.engine.step(0.0)
        self.engine.check_integrity()
        assert torch.equal(self.runner._last_tokens, self.other._last_tokens), "ranks choose the same"
        lengths = self.runner.sequences.lengths.tolist()
        assert lengths == self.other.sequences.lengths.tolist(), "ranks keep the same drafts"
        for message in self.publisher.take(TokenOutputs):
            for output in message.outputs:
                self.tokens[output.request_id] += unpack_int32(output.new_token_ids).tolist()
        return is_busy

    def answer(self, params: Mapping[str, SamplingParams]) -> dict[str, list[int]]:
        for name, one in params.items():
            self.submit(name, one, PROMPTS[name])
        while self.step():
            pass
        return self.tokens

    def masks(self) -> list[TokenMasks]:
        return [message for message in self.steps if isinstance(message, TokenMasks)]


@pytest.fixture(scope="module")
def expected(random_checkpoint: Path) -> dict[str, list[int]]:
    decoder = make_runner(random_checkpoint, 1, "torch").decoder
    layers = paged_of(decoder.cache_spec())

    @torch.inference_mode()
    def generate(prompt: Sequence[int], is_ruled: bool) -> list[int]:
        tokens = list(prompt)
        for _ in range(NUM_TOKENS):
            attention = PagedAttention(PagedTensors(layers, 16, 16, torch.float32, CPU))
            step = attention.plan([SequencePart(len(tokens), 0, range(16))])
            x, positions = decoder.embed(torch.tensor(tokens)), torch.arange(len(tokens)).expand(3, -1)
            logits = decoder.logits(decoder(x, positions, step)[-1:])[0]
            allowed = allowed_after(tokens[-1]) if is_ruled else list(range(len(logits)))
            tokens.append(max(allowed, key=lambda token: float(logits[token])))
        return tokens[len(prompt) :]

    return {name: generate(PROMPTS[name], PARAMS[name] is RULED) for name in PROMPTS}


def test_the_rule_matters(expected: dict[str, list[int]]) -> None:
    """Else equal tokens would prove nothing: the model chooses among what is allowed, and would not keep to
    it."""
    assert len({tuple(tokens) for tokens in expected.values()}) == len(PROMPTS)
    for name, tokens in expected.items():
        before = [PROMPTS[name][-1], *tokens]
        keeps = [token in allowed_after(last) for last, token in zip(before, tokens, strict=False)]
        assert all(keeps) == (PARAMS[name] is RULED)
        picked = [
            allowed_after(last).index(token)
            for last, token in zip(before, tokens, strict=False)
            if all(keeps)
        ]
        assert not picked or len(set(picked)) > 1


@pytest.mark.parametrize("has_overlap", [False, True], ids=["alone", "overlap"])
@pytest.mark.parametrize("budget", [4, 7, 512])
def test_chunks_and_company_do_not_change_it(
    budget: int, has_overlap: bool, random_checkpoint: Path, expected: dict[str, list[int]]
) -> None:
    rig = Rig(random_checkpoint, budget, has_overlap=has_overlap)
    assert rig.answer(PARAMS) == expected
    assert rig.rule.outputs == [[], []]


@pytest.mark.parametrize("num_blocks", [100, 22])
def test_guesses_change_nothing(
    num_blocks: int, random_checkpoint: Path, expected: dict[str, list[int]]
) -> None:
    """Some of them the rule does not allow. The other rank gets a mask for each one that it does."""
    texts = [[*PROMPTS[name], *tokens] for name, tokens in expected.items()]
    drafter = drafter_of(texts)
    rig = Rig(random_checkpoint, 30, num_blocks, has_overlap=False, drafter=drafter)
    assert rig.answer(PARAMS) == expected
    assert max(len(message.masks) for message in rig.masks()) > 4
    counts = drafter.counters
    assert counts["spec_decode_num_accepted_tokens"] > 10
    assert counts["spec_decode_num_draft_tokens"] > counts["spec_decode_num_accepted_tokens"]
    assert bool(rig.scheduler.num_preemptions) == (num_blocks < 100)


@pytest.mark.parametrize("has_overlap", [False, True], ids=["alone", "overlap"])
def test_a_preempted_request_goes_on_with_its_matcher(
    has_overlap: bool, random_checkpoint: Path, expected: dict[str, list[int]]
) -> None:
    num_blocks = sum(-(-len(prompt) // 4) for prompt in PROMPTS.values()) + len(PROMPTS)
    rig = Rig(random_checkpoint, 16, num_blocks, has_overlap)
    params = dict.fromkeys(PROMPTS, RULED)
    tokens = rig.answer(params)
    assert rig.scheduler.num_preemptions > 0
    assert {name: tokens[name] for name in PROMPTS if PARAMS[name] is RULED} == {
        name: expected[name] for name in PROMPTS if PARAMS[name] is RULED
    }
    assert tokens == Rig(random_checkpoint).answer(params)


@pytest.mark.parametrize("has_overlap", [False, True], ids=["alone", "overlap"])
def test_a_resubmission_goes_on_behind_its_earlier_tokens(
    has_overlap: bool, random_checkpoint: Path, expected: dict[str, list[int]]
) -> None:
    rig = Rig(random_checkpoint, 7, has_overlap=has_overlap)
    for name in PROMPTS:
        rig.submit(name, PARAMS[name], PROMPTS[name], expected[name][:5])
    while rig.step():
        pass
    assert rig.tokens == expected
    assert rig.rule.outputs == [expected[name][:5] for name in PROMPTS if PARAMS[name] is RULED]


def test_a_draw_among_what_is_allowed_is_the_same_beside_others(random_checkpoint: Path) -> None:
    alone = Rig(random_checkpoint, has_overlap=False).answer({"ruled": DRAWN})["ruled"]
    assert Rig(random_checkpoint, 7).answer({**PARAMS, "ruled": DRAWN})["ruled"] == alone
    assert all(
        token in allowed_after(last)
        for last, token in zip([PROMPTS["ruled"][-1], *alone], alone, strict=False)
    )


def test_the_forward_does_not_wait_for_the_token(random_checkpoint: Path) -> None:
    """With overlap the next forward is launched, and only then the matcher sees the token before."""
    rig = Rig(random_checkpoint)
    rig.answer({"ruled": RULED})
    middle = ["launch", "accept", "choose"]
    # The last token ends the request: its matcher is not told.
    assert rig.log == ["launch", "choose", *middle * (NUM_TOKENS - 1)]
    alone = Rig(random_checkpoint, has_overlap=False)
    alone.answer({"ruled": RULED})
    assert alone.log == [*["launch", "choose", "accept"] * (NUM_TOKENS - 1), "launch", "choose"]


def test_nothing_is_sent_where_no_row_has_a_matcher(random_checkpoint: Path) -> None:
    rig = Rig(random_checkpoint, 4)
    rig.answer({"free": FREE, "free too": FREE})
    assert rig.masks() == []
    assert "choose" not in rig.log
    rig = Rig(random_checkpoint, 4)
    rig.answer({"free": FREE, "ruled": RULED})
    plans = [message for message in rig.steps if isinstance(message, StepPlan)]
    assert len(rig.masks()) == NUM_TOKENS < len(plans), "chunks of its prompt have no choice"


def test_only_rows_with_a_matcher_wait(random_checkpoint: Path, expected: dict[str, list[int]]) -> None:
    rig = Rig(random_checkpoint, has_overlap=False)
    at_launch: list[list[int]] = []
    launch = rig.runner.launch

    def look(plan: StepPlan) -> LaunchedStep:
        launched = launch(plan)
        at_launch.append(rig.runner._last_tokens[:2].tolist())
        return launched

    rig.runner.launch = look  # type: ignore[method-assign]
    rig.answer({"free": FREE, "ruled": RULED})
    assert [tokens[0] for tokens in at_launch] == expected["free"], "chosen when the forward was launched"
    assert [tokens[1] for tokens in at_launch] == [PROMPTS["ruled"][-1], *expected["ruled"][:-1]]


def test_a_request_that_ends_while_its_choice_is_open_harms_nobody(random_checkpoint: Path) -> None:
    """One is stopped by the token before, when its next forward is under way; one is aborted."""
    whole = Rig(random_checkpoint).answer(PARAMS)
    end = whole["ruled"][4]
    params = {**PARAMS, "ruled": msgspec.structs.replace(RULED, stop_token_ids=(end,))}
    rig = Rig(random_checkpoint)
    tokens = rig.answer(params)
    stop = whole["ruled"].index(end) + 1
    assert tokens == {**whole, "ruled": whole["ruled"][:stop]}
    assert rig.masks()[stop].masks[0] == b"", "what a matcher says of a request that is over does not count"


@pytest.mark.interpreter
def test_the_way_of_a_gpu_gives_the_same(random_checkpoint: Path, expected: dict[str, list[int]]) -> None:
    """Padded decode batches, whose own choice does not count for rows that wait."""
    rig = Rig(random_checkpoint, attention="triton")
    count = 5
    params = {name: msgspec.structs.replace(PARAMS[name], max_tokens=count) for name in ("ruled", "free")}
    assert rig.answer(params) == {name: expected[name][:count] for name in params}


def test_a_step_is_not_launched_while_choices_are_open(random_checkpoint: Path) -> None:
    rig = Rig(random_checkpoint)
    rig.submit("ruled", RULED, PROMPTS["ruled"])
    rig.engine.stepper.choose = lambda: None  # type: ignore[method-assign]
    rig.engine.step(0.0)
    with pytest.raises(AssertionError, match="have not been chosen"):
        rig.engine.step(0.0)
