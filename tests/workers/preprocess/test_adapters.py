"""What preprocess makes of the adapter that a request names."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.checkpoints import EMBEDDED
from pipeline.wire.encoding import EncodeRequest
from pipeline.wire.generation import GenerateRequest, RequestRefused
from pipeline.wire.prompts import ChatMessage
from tests.adapters import is_of_text
from tests.pictures import encode, scene
from tests.workers.preprocess.test_preprocessor import make_rig
from tools.random_checkpoint.lora import write_adapter

PICTURE = encode(scene(1))
LONG = (ChatMessage("user", "Tell me of it. " * 100),)


@pytest.fixture
def lora(tmp_path: Path) -> tuple[str, ...]:
    """One of the whole model, one of the decoder."""
    base = EMBEDDED / "model"
    eyes = write_adapter(base, tmp_path / "eyes", 2)
    words = write_adapter(base, tmp_path / "words", 2, is_target=is_of_text)
    return f"eyes={eyes}", f"words={words}"


async def test_its_pictures_are_others_where_it_changes_the_tower(lora: tuple[str, ...]) -> None:
    async with make_rig(1, lora=lora) as rig:
        hashes, kv_hashes = {}, {}
        for name in ("", "words", "eyes"):
            rig.submit(f"by {name}", [PICTURE], adapter=name)
            await rig.settle()
            (generate,) = rig.llm.take(GenerateRequest)
            assert generate.adapter == name
            (item,) = generate.items
            hashes[name], kv_hashes[name] = item.mm_hash, item.kv_hash
            of_tower = {message.adapter for message in rig.vits[0].take(EncodeRequest)}
            assert of_tower == {name if name == "eyes" else ""}
            rig.end(f"by {name}")
        assert hashes[""] == hashes["words"] != hashes["eyes"]
        assert kv_hashes[""] == kv_hashes["words"] != kv_hashes["eyes"]
        await rig.settle()


async def test_one_that_is_not_served_is_refused(lora: tuple[str, ...]) -> None:
    async with make_rig(1, lora=lora) as rig:
        rig.submit("r", adapter="ears")
        (refused,) = rig.llm.take(RequestRefused)
        error = refused.error
        assert (error.status, error.code, error.field) == (404, "model_not_found", "adapter")
        assert error.message == "the adapter 'ears' is not served here, only 'eyes', 'words'"
    async with make_rig(1) as rig:
        rig.submit("r", adapter="ears")
        (refused,) = rig.llm.take(RequestRefused)
        assert refused.error.message == "the adapter 'ears' is not served here, and there is none"


async def test_groups_are_chosen_by_what_they_have_computed_for_it(lora: tuple[str, ...]) -> None:
    """A prefix of one adapter is no reason to go where another one's was computed."""
    async with make_rig(1, leads=(0, 1), lora=lora) as rig:
        chosen = []
        for number, name in enumerate(("words", "", "words", "")):
            rig.submit(f"r{number}", adapter=name, messages=LONG)
            await rig.settle()
            chosen += [lead for lead, llm in rig.llms.items() if llm.take(GenerateRequest)]
        assert chosen[:2] == [0, 1]
        assert chosen[2:] == chosen[:2]
        for number in range(4):
            rig.end(f"r{number}")
