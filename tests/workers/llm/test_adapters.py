"""Requests of several adapters and of the model itself in one batch: each has the text of Hugging Face's
model with that adapter merged."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from pipeline.wire.packing import unpack_int32
from pipeline.wire.sampling import SamplingParams
from tests.adapters import RANKS, is_of_text, make_adapters, merged, options_of
from tests.chats import CHATS, ChatTurns
from tests.checkpoints import make_checkpoint
from tests.engine_rig import NUM_TOKENS, Rig
from tests.pictures import scene
from tests.reference import Answer, Reference, assert_same_tokens
from tools.random_checkpoint.lora import write_adapter
from workers.llm.decode_graphs import DecodeGraphs, Outputs
from workers.llm.sequences import StepRows
from workers.nn.weights.adapters import AdapterSet

CHAT: ChatTurns = [("user", ["What is", scene(1, (84, 84)), "and what is the capital of France?"])]
LONG: ChatTurns = [("user", ["What is the capital of France? " * 24])]  # states are kept at few places
NAMES = ("", *RANKS)


class Adapted(NamedTuple):
    folder: Path
    lora: tuple[str, ...]
    answers: dict[str, Answer]  # by the adapter's name


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_5_moe"])
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    place = tmp_path_factory.mktemp(request.param)
    folder = make_checkpoint(place / "base", request.param)
    adapters = make_adapters(folder, place)
    folders = {"": folder} | {
        name: merged(folder, adapter, place / f"merged-{name}") for name, adapter in adapters.items()
    }
    answers = {name: Reference(one).answer(CHAT, NUM_TOKENS) for name, one in folders.items()}
    assert len({tuple(answer.token_ids) for answer in answers.values()}) == len(NAMES)
    return Adapted(folder, options_of(adapters), answers)


def submit(rig: Rig, name: str, request_id: str, chat: ChatTurns = CHAT, **options: object) -> None:
    message, embeddings = rig.request(chat, request_id, adapter=name, **options)
    rig.engine.handle(message, rig.now)
    for embedding in embeddings:
        rig.engine.handle(embedding, rig.now)


def tokens_of(rig: Rig) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for output in rig.outputs():
        found.setdefault(output.request_id, []).extend(unpack_int32(output.new_token_ids).tolist())
    return found


def assert_all_right(rig: Rig, adapted: Adapted, what: str) -> None:
    """All names at once, and one of them twice."""
    rig.open_pool()
    asked = [*NAMES, NAMES[1]]
    for number, name in enumerate(asked):
        submit(rig, name, f"{number}")
    rig.run()
    found = tokens_of(rig)
    for number, name in enumerate(asked):
        assert_same_tokens(found[f"{number}"], adapted.answers[name], f"{what}, adapter {name!r}")


def test_three_adapters_and_the_model_in_one_batch(adapted: Adapted) -> None:
    assert_all_right(Rig(adapted.folder, 512, lora=adapted.lora), adapted, "in one batch")


def test_in_small_parts_and_with_guesses(adapted: Adapted) -> None:
    """Parts of prompts beside decodes; of a guess each row has its request's adapter."""
    is_hybrid = "qwen3_5" in adapted.folder.parent.name
    options = {"speculative": "mtp" if is_hybrid else "ngram", "num_snapshots": 8}
    rig = Rig(adapted.folder, 23, block_size=4, lora=adapted.lora, **options)  # type: ignore[arg-type]
    assert_all_right(rig, adapted, "in small parts")


class CountedRuns:
    """How many sequences each run of these graphs has."""

    def __init__(self, graphs: DecodeGraphs) -> None:
        self.counts: list[int] = []
        self._run, graphs.run = graphs.run, self.run  # type: ignore[method-assign]

    def run(self, rows: StepRows, params: npt.NDArray[np.int32]) -> Outputs:
        self.counts.append(len(rows.slots))
        return self._run(rows, params)


@pytest.mark.interpreter
def test_as_a_cuda_graph_would_capture_it(random_checkpoint: Path, tmp_path: Path) -> None:
    """Uncaptured here."""
    lora = options_of(make_adapters(random_checkpoint, tmp_path, {"first": 4, "second": 3}))
    few = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, seed=1)
    found = []
    for attention in ("torch", "triton"):
        rig = Rig(random_checkpoint, 512, attention=attention, lora=lora)
        graphs = rig.engine.runner._adapted_graphs
        num_runs = CountedRuns(graphs) if graphs is not None else None
        for number, name in enumerate(("second", "")):
            submit(rig, name, f"{number}", [("user", ["Hi"])], sampling=few)
        rig.run()
        found.append(tokens_of(rig))
    assert found[0] == found[1]
    assert num_runs is not None
    assert num_runs.counts == [2]


def test_a_step_without_adapters_is_as_without_the_option(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(random_checkpoint, 512, lora=options_of(make_adapters(random_checkpoint, tmp_path)))

    def add(*_: object) -> None:
        raise AssertionError("something is computed for adapters")

    monkeypatch.setattr(AdapterSet, "of_rows", add)
    submit(rig, "", "1", CHATS["text only"])
    rig.run()
    assert len(rig.tokens("1")) == NUM_TOKENS


def cached(rig: Rig, name: str, request_id: str, **options: object) -> int:
    few = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, seed=1)
    submit(rig, name, request_id, LONG, sampling=few, **options)
    rig.run()
    return max(output.num_cached_tokens for output in rig.outputs() if output.request_id == request_id)


def test_no_prefix_is_shared_with_another_adapter(adapted: Adapted) -> None:
    rig = Rig(adapted.folder, 512, block_size=4, lora=adapted.lora, num_snapshots=16)
    rig.open_pool()
    for name in NAMES:
        assert cached(rig, name, f"{name} first") == 0
    for name in NAMES:
        num_cached = cached(rig, name, f"{name} again")
        assert num_cached > 0
        assert cached(rig, name, f"{name} salted", cache_salt=b"salt") == 0


def test_no_salt_opens_the_prefixes_of_an_adapter(random_checkpoint: Path, tmp_path: Path) -> None:
    rig = Rig(
        random_checkpoint, 512, block_size=4, lora=options_of(make_adapters(random_checkpoint, tmp_path))
    )
    rig.open_pool()
    assert cached(rig, "first", "one") == 0
    digest = rig.engine.runner.adapters[0].digest
    for number, salt in enumerate((digest, b"first", digest * 2)):
        assert cached(rig, "", f"guess {number}", cache_salt=salt) == 0


def test_an_adapter_that_nobody_knows_is_refused(random_checkpoint: Path) -> None:
    from pipeline.wire.clients import RequestFailed

    rig = Rig(random_checkpoint, 512)
    submit(rig, "nobody's", "1", CHATS["text only"])
    rig.run()
    (failed,) = rig.publisher.take(RequestFailed)
    assert (failed.error.status, failed.error.field) == (404, "adapter")


def saved_by_peft(folder: Path, place: Path, **settings: object) -> Sequence[Path]:
    """PEFT's own files, and its own merged checkpoint."""
    import peft

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    made = peft.get_peft_model(model, peft.LoraConfig(**settings))
    torch.manual_seed(7)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    made.save_pretrained(place / "adapter")
    made.merge_and_unload().save_pretrained(place / "merged")
    for path in folder.iterdir():
        if not (place / "merged" / path.name).exists():
            (place / "merged" / path.name).write_bytes(path.read_bytes())
    return place / "adapter", place / "merged"


def test_files_of_peft_are_read_as_it_means_them(random_checkpoint: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter, whole = saved_by_peft(
            random_checkpoint,
            tmp_path,
            r=4,
            lora_alpha=6,
            use_rslora=True,
            target_modules=r".*language_model.*\.(q_proj|v_proj|o_proj|down_proj)",
            rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
            alpha_pattern={"v_proj": 3},
        )
    shapes = {tuple(tensor.shape) for tensor in load_file(adapter / "adapter_model.safetensors").values()}
    assert {rank for shape in shapes for rank in shape} >= {2, 4, 7}
    rig = Rig(random_checkpoint, 512, lora=(f"peft={adapter}",))
    rig.open_pool()
    submit(rig, "peft", "1")
    rig.run()
    assert_same_tokens(rig.tokens("1"), Reference(whole).answer(CHAT, NUM_TOKENS), "PEFT's files")


def test_a_layer_that_takes_none_is_named_by_the_worker(random_checkpoint: Path, tmp_path: Path) -> None:
    """The launcher refuses it, too."""
    adapter = write_adapter(random_checkpoint, tmp_path / "odd", 2, is_target=is_of_text)
    path = adapter / "adapter_model.safetensors"
    odd = {name.replace("mlp.up_proj", "mlp.other"): tensor for name, tensor in load_file(path).items()}
    save_file(odd, path)
    with pytest.raises(
        ValueError, match=r"'odd' has the tensor .*mlp\.other\.lora_A\.weight, and adapters of"
    ):
        Rig(random_checkpoint, 512, lora=(f"odd={adapter}",))
