"""Preprocess without its process: what it tells the LLM and the ViTs, and what it keeps, when requests come,
cross and go."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import io
import itertools
import tempfile
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from PIL import Image

from launcher.checkpoints import EMBEDDED
from pipeline.config import Config, ModelConfig, PreprocessConfig
from pipeline.families import ImageSize, read_model_info
from pipeline.process.flight_recorder import FlightRecorder, digest_of
from pipeline.process.nodes import NodeMap
from pipeline.process.quarantine import Quarantine
from pipeline.process.trace import Tracer
from pipeline.transport.cluster import NodeSpec
from pipeline.transport.keys import KeyPair
from pipeline.transport.slots import SlotAllocator
from pipeline.transport.tensors import TensorPool
from pipeline.wire.base import ChunkKey, PoolOpened
from pipeline.wire.clients import AbortRequest, ChoiceProgress, Hello, Preparing, QueryRequest, SubmitRequest
from pipeline.wire.control import WorkerState
from pipeline.wire.encoding import (
    CancelEncode,
    EncodeMiss,
    EncodeRequest,
    ItemNotNeeded,
    PixelsCopied,
    PixelsReleased,
    RequestEnded,
)
from pipeline.wire.errors import RequestError
from pipeline.wire.generation import GenerateRequest, RequestNotYours, RequestRefused, Via
from pipeline.wire.packing import pack_int32, unpack_int32
from pipeline.wire.prompts import Chat, ChatMessage, ImagePart, Text, TextPart, Tokens, VideoPart
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.topology import Role, WorkerId
from tests.fakes import LLM_0, PREPROCESS, VIT_0, FakeSink
from tests.pictures import encode, noise, scene
from tests.videos import CLIP, read_number
from workers.preprocess import chunks, item_reader
from workers.preprocess.fetch import MAX_URL
from workers.preprocess.images import decode
from workers.preprocess.media import PictureSource
from workers.preprocess.preprocessor import Preprocessor
from workers.preprocess.prompt_reader import PromptReader
from workers.preprocess.threads import on_behalf_of

CLIENT, OTHER = b"c" * 16, b"o" * 16


@dataclass
class Rig:
    core: Preprocessor
    llm: FakeSink
    vits: list[FakeSink]
    allocator: SlotAllocator
    context: Any
    llms: dict[int, FakeSink] = field(default_factory=dict)
    arrivals: int = 0
    decoded: list[object] = field(default_factory=list)

    def submit(self, request_id: str, pictures: list[bytes] | None = None, **fields: Any) -> None:
        pictures = pictures or []
        parts = (*(ImagePart(frame=index) for index in range(len(pictures))), TextPart("What is it?"))
        values = {
            "client_id": CLIENT,
            "attempt": 1,
            "prompt": Chat(fields.pop("messages", (ChatMessage("user", parts),))),
            "sampling": SamplingParams(),
            **fields,
        }
        self.core.on_ingest(
            SubmitRequest(request_id=request_id, **values), [memoryview(picture) for picture in pictures]
        )

    def query(self, request_id: str, **fields: Any) -> None:
        values = {"client_id": CLIENT, "attempt": 1, **fields}
        self.core.on_ingest(QueryRequest(request_id=request_id, **values), [])

    async def settle(self) -> None:
        """Until tasks, threads and reading processes have nothing more to do."""
        num_quiet = 0
        async with asyncio.timeout(60):
            while num_quiet < 40:
                await asyncio.sleep(0.005)
                num_quiet = num_quiet + 1 if self.core.readers.is_idle else 0

    async def until_told(self) -> None:
        """Until the LLM is sent something."""
        async with asyncio.timeout(10):
            while not self.llm.sent:
                await asyncio.sleep(0.01)

    def feedback(self, kind: Any, **fields: Any) -> None:
        sender = VIT_0 if kind in (EncodeMiss, PixelsReleased) else LLM_0
        self.core.on_feedback(kind(sender=sender, epoch=1, **fields))

    def end(self, request_id: str, attempt: int = 1, is_interrupted: bool = False) -> None:
        known = self.core._requests.get(request_id)
        client_id = CLIENT if known is None else known.client_id
        self.feedback(
            RequestEnded,
            client_id=client_id,
            request_id=request_id,
            attempt=attempt,
            is_interrupted=is_interrupted,
        )

    def encodes(self) -> list[EncodeRequest]:
        return [message for vit in self.vits for message in vit.take(EncodeRequest)]

    def check_nothing_left(self) -> None:
        assert self.core.num_open == 0
        assert self.core.num_held_bytes == 0
        assert self.allocator.num_used == 0
        assert self.core.chunks._chunks == {}
        self.core.tick(0.0)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with make_rig(2) as made:
        yield made


def make_rig(
    num_vits: int,
    leads: tuple[int, ...] = (0,),
    lora: tuple[str, ...] = (),
    nodes: NodeSpec | None = None,
    **options: Any,
) -> Any:
    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def run() -> AsyncIterator[Rig]:
        epochs = {WorkerId(Role.VIT, index): 1 for index in range(num_vits)}
        with tempfile.TemporaryDirectory() as folder:
            context: Any = SimpleNamespace(
                origin={"sender": PREPROCESS, "epoch": 1},
                sockets=SimpleNamespace(epochs=epochs),
                epoch_of=lambda worker: epochs.get(worker, 0),
                nodes=NodeMap(nodes),
                spec=SimpleNamespace(placement=SimpleNamespace(num_threads=2), node=nodes),
                config=Config(model=ModelConfig(lora=lora)),
                is_current=lambda message: message.epoch >= 1,
                tracer=Tracer("", PREPROCESS),
                recorder=FlightRecorder(Path(folder), PREPROCESS),
                quarantine=Quarantine(Role.PREPROCESS, {}),
            )
            allocator = SlotAllocator(1 << 20, 1 << 18, 16)
            pool = TensorPool.on_host("preprocess.0", 1, 1 << 20, 16)
            llms, vits = {lead: FakeSink() for lead in leads}, [FakeSink() for _ in range(num_vits)]
            async with asyncio.TaskGroup() as tasks:
                info = read_model_info(EMBEDDED / "model")
                core = Preprocessor(
                    context, PreprocessConfig(**options), info, pool, allocator, llms, vits, tasks
                )
                yield Rig(core, llms[leads[0]], vits, allocator, context, llms)
                await core.close()
            pool.close()

    return run()


async def test_metadata_goes_first_then_hashes_then_pixels(rig: Rig) -> None:
    rig.submit("r", [encode(scene(1)), encode(scene(2))])
    await rig.settle()
    (generate,) = rig.llm.take(GenerateRequest)
    assert [span.length for item in generate.items for span in item.spans] == [16, 16]
    assert sorted(chunk.vit for item in generate.items for chunk in item.chunks) == [0, 1], (
        "spread over the ViTs"
    )
    for vit in rig.vits:
        first, second = vit.take(EncodeRequest)
        assert (first.pixels, first.will_follow) == (None, True)
        assert second.pixels is not None
        assert not second.will_follow
        assert second.pixels.shape == (1, 112, 112, 3)
        rig.feedback(PixelsReleased, key=first.key)
    assert rig.allocator.num_used == 0
    rig.end("r")
    rig.check_nothing_left()


async def test_a_known_hash_is_asked_for_without_pixels_until_it_is_missed(rig: Rig) -> None:
    picture = encode(scene(1))
    rig.submit("a", [picture])
    await rig.settle()
    place = rig.llm.take(GenerateRequest)[0].items[0].chunks[0].vit
    for message in rig.encodes():
        if message.pixels is not None:
            rig.feedback(PixelsReleased, key=message.key)
    rig.submit("b", [picture])
    await rig.settle()
    (ask,) = rig.encodes()
    assert (ask.pixels, ask.will_follow) == (None, False)
    assert rig.llm.take(GenerateRequest)[0].items[0].chunks[0].vit == place
    rig.feedback(EncodeMiss, key=ask.key)
    rig.feedback(EncodeMiss, key=ask.key)  # said twice, decoded once
    await rig.settle()
    (answer,) = rig.encodes()
    assert answer.pixels is not None
    # the pixels came when others were there already, and those are gone
    rig.feedback(EncodeMiss, key=ask.key)
    (again,) = rig.encodes()
    assert again.sent_at > answer.sent_at > 0
    assert msgspec.structs.replace(again, sent_at=answer.sent_at) == answer
    rig.feedback(PixelsReleased, key=answer.key)
    rig.end("a")
    rig.end("b")
    rig.check_nothing_left()


@pytest.mark.parametrize("when", ["before decoding", "while decoding", "with the ViT"])
async def test_a_request_that_ends_early_leaves_nothing(rig: Rig, when: str) -> None:
    rig.submit("r", [encode(noise(seed, (140, 140))) for seed in range(8)])
    while not rig.llm.sent:
        await asyncio.sleep(0)
    if when == "while decoding":
        await asyncio.sleep(0)
    if when == "with the ViT":
        await rig.settle()
    rig.end("r")
    await rig.settle()
    assert sum(len(message.keys) for vit in rig.vits for message in vit.take(CancelEncode)) == 8
    for message in rig.encodes():
        if message.pixels is not None:
            rig.feedback(PixelsReleased, key=message.key)
    rig.check_nothing_left()


async def test_an_item_that_is_not_needed_is_cancelled_and_others_are_not(rig: Rig) -> None:
    rig.submit("r", [encode(scene(1)), encode(scene(2))])
    while not rig.llm.sent:
        await asyncio.sleep(0)
    rig.feedback(ItemNotNeeded, request_id="r", attempt=1, item=0)
    await rig.settle()
    cancelled = [key.item for vit in rig.vits for message in vit.take(CancelEncode) for key in message.keys]
    assert cancelled == [0]
    assert {message.key.item for message in rig.encodes() if message.pixels is not None} >= {1}


async def test_a_broken_picture_fails_each_request_that_has_it(rig: Rig) -> None:
    broken = encode(noise(1, (140, 140)))[:20_000]
    for name in ("a", "b"):
        rig.submit(name, [broken])
    await rig.settle()
    (failure,) = rig.llm.take(RequestRefused)
    first, second = ("a", "b") if failure.request_id == "a" else ("b", "a")  # they are read side by side
    (waiting,) = [m for m in rig.encodes() if m.key.request_id == second]
    assert (failure.request_id, failure.error.status, failure.error.field) == (
        first,
        400,
        "messages[0].content[0].image_url",
    )
    rig.end(first)
    rig.feedback(EncodeMiss, key=waiting.key)  # the ViT turns to the next who wants it
    await rig.settle()
    (failure,) = rig.llm.take(RequestRefused)
    assert failure.request_id == second
    rig.end(second)
    rig.check_nothing_left()


async def test_a_query_is_passed_on_and_never_run_again(rig: Rig) -> None:
    rig.submit("r")
    await rig.settle()
    assert len(rig.llm.take(GenerateRequest)) == 1
    rig.query("r", num_received=(5,))
    rig.end("r")
    rig.query("r", num_received=(7,))
    assert [m.num_received for m in rig.llm.take(QueryRequest)] == [(5,), (7,)]
    rig.submit("r")
    await rig.settle()
    assert rig.llm.sent == [], "an attempt runs once"
    rig.check_nothing_left()


async def test_a_query_about_an_unknown_request_is_passed_on_and_leaves_nothing(rig: Rig) -> None:
    """The LLM knows what went through our predecessor; of the rest it says that it is unknown."""
    rig.query("gone")
    rig.submit("r")
    await rig.settle()
    rig.query("r", attempt=2)
    assert [(m.request_id, m.attempt) for m in rig.llm.take(QueryRequest)] == [("gone", 1), ("r", 2)]
    rig.query("r", client_id=OTHER)
    assert [m.client_id for m in rig.llm.take(RequestNotYours)] == [OTHER]
    rig.end("r")
    rig.check_nothing_left()


async def test_an_ended_request_of_another_client_is_in_nobodys_way(rig: Rig) -> None:
    """After a restart of preprocess: a stranger used the id of a request that runs, and was refused."""
    rig.submit("r", client_id=OTHER, attempt=9)
    await rig.settle()
    rig.end("r", 9)
    rig.llm.take()
    rig.query("r", lead=0)
    rig.core.on_ingest(AbortRequest(client_id=CLIENT, request_id="r", attempt=1, lead=0), [])
    assert [type(message) for message in rig.llm.take()] == [QueryRequest, AbortRequest]
    rig.submit("r", attempt=2)
    await rig.settle()
    assert [m.client_id for m in rig.llm.take(GenerateRequest)] == [CLIENT]
    rig.end("r", 2)
    rig.check_nothing_left()


async def test_tokens_of_earlier_attempts_are_bounded_and_held() -> None:
    async with make_rig(1, max_open_media_mib=1) as rig:
        limit = rig.core._info.text.max_position_embeddings
        rig.submit("long", choices=(ChoiceProgress(bytes(4 * limit + 4)),))
        (refusal,) = rig.llm.take(RequestRefused)
        assert refusal.error.field == "choices"
        assert str(limit) in refusal.error.message
        whole = tuple(ChoiceProgress(bytes(4 * limit)) for _ in range(16))
        rig.submit("r", choices=whole, sampling=SamplingParams(n=16))
        assert rig.core.num_held_bytes >= 16 * 4 * limit
        await rig.settle()
        rig.end("long")
        rig.end("r")
        rig.check_nothing_left()


async def test_a_choice_is_aborted_where_it_runs(rig: Rig) -> None:
    rig.submit("r", sampling=SamplingParams(n=2))
    abort = AbortRequest(client_id=CLIENT, request_id="r", attempt=1, index=1)
    rig.core.on_ingest(abort, [])
    assert rig.llm.sent == [], "nothing of it runs yet: its client says it again"
    await rig.settle()
    rig.core.on_ingest(abort, [])
    assert rig.llm.take(AbortRequest) == [abort]
    rig.end("r")
    rig.check_nothing_left()


async def test_another_client_can_neither_abort_nor_take_a_request(rig: Rig) -> None:
    rig.submit("r")
    rig.core.on_ingest(AbortRequest(client_id=OTHER, request_id="r", attempt=1), [])
    assert rig.llm.sent == []
    rig.submit("r", client_id=OTHER)
    (refusal,) = rig.llm.take(RequestNotYours)
    assert refusal.client_id == OTHER
    rig.feedback(RequestEnded, client_id=OTHER, request_id="r", attempt=1)
    assert rig.core.num_open == 1
    await rig.settle()
    assert len(rig.llm.take(GenerateRequest)) == 1, "the first one goes on"


async def test_a_late_abort_of_an_older_attempt_is_dropped(rig: Rig) -> None:
    rig.submit("r", attempt=1)
    rig.submit("r", attempt=2)
    rig.core.on_ingest(AbortRequest(client_id=CLIENT, request_id="r", attempt=1), [])
    await rig.settle()
    assert [m.attempt for m in rig.llm.take(GenerateRequest)] == [2]
    rig.submit("r", attempt=1)
    assert rig.core.counters["stale_messages"] == 2
    rig.end("r", 2)
    rig.check_nothing_left()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"choices": (ChoiceProgress(b"abc"),)}, "choices"),
        ({"choices": (ChoiceProgress(pack_int32([-1])),)}, "choices"),
        ({"choices": (ChoiceProgress(pack_int32([2**31 - 1])),)}, "choices"),
        ({"choices": (ChoiceProgress(), ChoiceProgress())}, "choices"),
        ({"attempt": 0}, "attempt"),
        ({"messages": (ChatMessage("user", (ImagePart(frame=7),)),)}, "messages[0].content[0].image_url"),
        ({"messages": (ChatMessage("user", (ImagePart(),)),)}, "messages[0].content[0].image_url"),
        ({"messages": ()}, "messages"),
        ({"messages": (ChatMessage("user", "x"),) * 2000}, "messages"),
        ({"messages": (ChatMessage("user", (TextPart("x"),) * 3000),) * 2}, "messages"),
        ({"prompt": Text("")}, "prompt"),
        ({"prompt": Text("a " * 40_000)}, "prompt"),
        ({"prompt": Text("<|image_pad|>")}, "prompt"),
        ({"prompt": Tokens(b"")}, "prompt"),
        ({"prompt": Tokens(b"abc")}, "prompt"),
        ({"prompt": Tokens(pack_int32([-1]))}, "prompt"),
        ({"prompt": Tokens(pack_int32([2**31 - 1]))}, "prompt"),
        ({"prompt": Tokens(pack_int32([1] * 40_000))}, "prompt"),
        ({"sampling": SamplingParams(truncate_prompt_tokens=40_000)}, "truncate_prompt_tokens"),
        ({"sampling": SamplingParams(truncate_prompt_tokens=-1, max_tokens=2**30)}, "truncate_prompt_tokens"),
        ({"cache_salt": b"s" * 257}, "cache_salt"),
        ({"priority": 2**40}, "priority"),
        ({"tenant": "t" * 257}, "tenant"),
    ],
)
async def test_what_no_client_of_ours_would_send_is_refused(
    rig: Rig, fields: dict[str, Any], field: str
) -> None:
    rig.submit("r", **fields)
    await rig.settle()
    (refusal,) = rig.llm.take()
    assert isinstance(refusal, RequestRefused)
    assert refusal.error.field == field
    rig.end("r", fields.get("attempt", 1))
    rig.check_nothing_left()


async def test_a_prompt_of_any_length_is_cut_to_its_last_tokens(rig: Rig) -> None:
    cut = SamplingParams(truncate_prompt_tokens=3)
    rig.submit("ids", prompt=Tokens(pack_int32([1] * 40_000 + [7, 8])), sampling=cut)
    rig.submit("text", prompt=Text("a " * 40_000 + "b"), sampling=cut)
    await rig.settle()
    sent = {message.request_id: message for message in rig.llm.take(GenerateRequest)}
    assert unpack_int32(sent["ids"].prompt_token_ids).tolist() == [1, 7, 8]
    assert len(unpack_int32(sent["text"].prompt_token_ids)) == 3
    assert unpack_int32(sent["ids"].positions).tolist() == [0, 1, 2] * 3


async def test_a_cut_that_would_take_a_part_of_a_picture_is_refused(rig: Rig) -> None:
    rig.submit("r", [encode(scene(1))], sampling=SamplingParams(truncate_prompt_tokens=12))
    await rig.settle()
    (refusal,) = rig.llm.take(RequestRefused)
    assert refusal.error.field == "truncate_prompt_tokens"
    assert "leave out a part of a picture" in refusal.error.message
    rig.end("r")


async def test_media_of_a_prompt_of_ids_are_those_of_a_chat(rig: Rig) -> None:
    """Same picture, same placeholders, same keys; and a picture without a placeholder is refused."""
    rig.submit("chat", [encode(scene(1))])
    await rig.settle()
    (chat,) = rig.llm.take(GenerateRequest)
    tokens = Tokens(chat.prompt_token_ids, (ImagePart(frame=0),))
    rig.submit("ids", [encode(scene(1))], prompt=tokens)
    rig.submit("none", [encode(scene(1))], prompt=Tokens(pack_int32([5]), (ImagePart(frame=0),)))
    await rig.settle()
    (ids,) = rig.llm.take(GenerateRequest)
    assert ids.prompt_token_ids == chat.prompt_token_ids
    assert ids.positions == chat.positions
    assert [(item.spans, item.kv_hash) for item in ids.items] == [
        (item.spans, item.kv_hash) for item in chat.items
    ]
    (refusal,) = rig.llm.take(RequestRefused)
    assert (refusal.request_id, refusal.error.field) == ("none", "prompt")
    for request_id in ("chat", "ids"):
        rig.end(request_id)


async def test_an_unforeseen_failure_ends_its_request_only(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(*args: object) -> None:
        raise ZeroDivisionError("a strange template")

    build, rig.core.prompts.builder.build = rig.core.prompts.builder.build, explode  # type: ignore[method-assign,assignment]
    rig.submit("bad")
    await rig.settle()
    (refusal,) = rig.llm.take(RequestRefused)
    assert refusal.error.status == 500
    assert "strange" not in refusal.error.message
    assert "a strange template" in caplog.text
    rig.core.prompts.builder.build = build  # type: ignore[method-assign]
    rig.submit("good")
    await rig.settle()
    assert len(rig.llm.take(GenerateRequest)) == 1


async def test_memory_and_requests_are_bounded() -> None:
    async with make_rig(1, max_open_media_mib=1, max_open_requests=2) as rig:
        large = encode(noise(1, (500, 500)))
        assert 1 << 19 < len(large) < 1 << 20
        rig.submit("a", [large])
        rig.submit("b", [large])
        (refusal,) = rig.llm.take(RequestRefused)
        assert (refusal.request_id, refusal.error.status) == ("b", 429), "two are all that may be open"
        rig.submit("c", [large], client_id=OTHER)
        (refusal,) = rig.llm.take(RequestRefused)
        assert (refusal.request_id, refusal.error.status) == ("c", 503), "two such pictures are too much"
        rig.submit("e", client_id=OTHER)
        rig.submit("f", client_id=b"f" * 16)
        (refusal,) = rig.llm.take(RequestRefused)
        assert (refusal.request_id, refusal.error.status) == ("f", 503), "the server is full, by others"
        await rig.settle()
        for message in rig.encodes():
            if message.pixels is not None:
                rig.feedback(PixelsReleased, key=message.key)
        for name in "abcef":
            rig.end(name)
        rig.check_nothing_left()
        rig.submit("d", [large])
        await rig.settle()
        assert len(rig.llm.take(GenerateRequest)) == 3, "a's, e's and d's"


async def test_a_tenant_with_everything_open_refuses_nobody_else() -> None:
    """Whoever has connected, and whatever it calls its attempts."""
    async with make_rig(1, max_open_requests=16) as rig:
        for number in range(40):
            client_id, attempt = number.to_bytes(16, "big"), 1 + number % 3
            rig.submit(f"flood-{number}", client_id=client_id, tenant="key:flood", attempt=attempt)
        rig.submit("victim", tenant="key:victim")
        await rig.settle()
        told = rig.llm.take(RequestRefused)
        assert {message.error.status for message in told if message.error is not None} == {429}
        assert len(served := [message.request_id for message in rig.llm.take(GenerateRequest)]) == 15
        assert "victim" in served
        rig.submit("long", tenant="x" * 257)
        (refusal,) = rig.llm.take(RequestRefused)
        assert (refusal.error.status, refusal.error.field) == (400, "tenant")


@pytest.mark.parametrize(
    ("allowed", "tenants"),
    [
        ((), []),
        (("ops",), ["key:ops", "curve:ops"]),
        (("all",), ["", "key:ops", "curve:ops", "peer:ops", "key:other", "ops"]),
    ],
)
async def test_a_priority_is_for_whom_the_option_names(allowed: tuple[str, ...], tenants: list[str]) -> None:
    async with make_rig(1, allow_priority=allowed) as rig:
        for tenant in ("", "key:ops", "curve:ops", "peer:ops", "key:other", "ops"):
            rig.submit(f"of {tenant}", tenant=tenant, priority=-1)
            rig.submit(f"without, {tenant}", tenant=tenant)
        await rig.settle()
        served = {message.request_id: message.priority for message in rig.llm.take(GenerateRequest)}
        with_priority = [name for name, priority in served.items() if priority]
        assert sorted(with_priority) == sorted(f"of {tenant}" for tenant in tenants)
        assert len(served) == 6 + len(tenants)
        refusals = rig.llm.take(RequestRefused)
        assert {(refusal.error.status, refusal.error.field) for refusal in refusals} <= {(400, "priority")}
        assert all("--allow-priority" in refusal.error.message for refusal in refusals)


async def test_groups_share_the_work_and_each_hears_of_its_own_requests_only() -> None:
    async with make_rig(1, leads=(0, 2)) as rig:
        for number in range(4):
            rig.submit(f"r{number}", [encode(scene(number))])
            await rig.settle()
        requests = {
            lead: [message.request_id for message in llm.take(GenerateRequest)]
            for lead, llm in rig.llms.items()
        }
        assert sorted(len(names) for names in requests.values()) == [2, 2]
        for message in rig.encodes():
            assert message.key.request_id in requests[message.key.lead]
            if message.pixels is not None:
                rig.feedback(PixelsReleased, key=message.key)
        (name, _) = requests[2]
        rig.core.on_ingest(AbortRequest(client_id=CLIENT, request_id=name, attempt=1), [])
        assert [message.request_id for message in rig.llms[2].take(AbortRequest)] == [name]
        assert rig.llms[0].sent == []
        rig.core.on_ingest(Hello(client_id=CLIENT, protocol=1), [])
        assert all(len(llm.take(Hello)) == 1 for llm in rig.llms.values())
        for number in range(4):
            rig.end(f"r{number}")
        rig.check_nothing_left()


async def test_a_further_attempt_goes_to_the_same_group_and_counts_once() -> None:
    async with make_rig(1, leads=(0, 2), max_open_requests=1) as rig:
        rig.core._groups.outstanding[0] += 1  # so that the first goes to the other one
        rig.submit("r")
        await rig.settle()
        assert len(rig.llms[2].take(GenerateRequest)) == 1
        rig.end("r", is_interrupted=True)
        rig.submit("other")
        await rig.settle()
        assert rig.core.num_open == 1, "the server is full now"
        rig.submit("r", attempt=2)
        await rig.settle()
        told = [(message.request_id, message.attempt) for message in rig.llms[2].take(GenerateRequest)]
        assert told == [("other", 1), ("r", 2)], "what was begun is gone on with"
        assert rig.core.num_open == 2
        rig.end("r", attempt=2)
        rig.end("other")
        rig.core._groups.outstanding[0] -= 1
        rig.check_nothing_left()


async def test_tenants_share_no_cached_picture(rig: Rig) -> None:
    picture = encode(scene(1))
    for name, salt in (("a", b""), ("b", b"x"), ("c", b"x")):
        rig.submit(name, [picture], cache_salt=salt)
    await rig.settle()
    hashes = {message.request_id: message.items[0].mm_hash for message in rig.llm.take(GenerateRequest)}
    assert hashes["a"] != hashes["b"] == hashes["c"]
    for message in rig.encodes():
        if message.pixels is not None:
            rig.feedback(PixelsReleased, key=message.key)
    for name in "abc":
        rig.end(name)
        rig.feedback(PixelsReleased, key=ChunkKey(name, 1, 0, 0))
    rig.check_nothing_left()


def num_times(message: GenerateRequest) -> int:
    """How many positions in time its first item has."""
    (span,) = message.items[0].spans
    times = unpack_int32(message.positions).reshape(3, -1)[0, span.offset : span.stop]
    return len(set(times.tolist()))


async def test_a_video_is_spread_over_the_vits_and_arrives_in_its_chunks(rig: Rig) -> None:
    part = VideoPart(frame=0)
    rig.submit("r", [CLIP.data], messages=(ChatMessage("user", (part, TextPart("What happens?"))),))
    async with asyncio.timeout(20):
        while not (generated := rig.llm.take(GenerateRequest)):
            await asyncio.sleep(0.01)
        (item,) = generated[0].items
        assert num_times(generated[0]) == 3
        assert item.kv_hash == item.mm_hash
        assert [chunk.num_tokens for chunk in item.chunks] == [item.spans[0].length // 3] * 3
        assert sorted(chunk.vit for chunk in item.chunks) == [0, 0, 1]
        assert len({chunk.mm_hash for chunk in item.chunks}) == 3
        seen = {}
        while len(seen) < 3:
            await asyncio.sleep(0.01)
            seen |= {message.key.chunk: message for message in rig.encodes() if message.pixels is not None}
    frames = [
        read_number(frame)
        for _, message in sorted(seen.items())
        for frame in rig.core.chunks._pool.array(message.pixels)
    ]
    assert frames == [0, 5, 10, 15, 20, 25]
    rig.feedback(ItemNotNeeded, request_id="r", attempt=1, item=0)
    cancelled = {key.chunk for vit in rig.vits for message in vit.take(CancelEncode) for key in message.keys}
    assert cancelled == {0, 1, 2}, "an item is cancelled with all its chunks"
    for message in seen.values():
        rig.feedback(PixelsReleased, key=message.key)
    rig.end("r")
    rig.check_nothing_left()


async def test_other_frames_of_a_video_never_share_a_key(rig: Rig) -> None:
    """30 frames at 10 a second: the settings choose the frames, and every choice has keys of its own."""
    parts = {
        "whole": VideoPart(frame=0),
        "four": VideoPart(frame=0, nframes=4),
        "the end": VideoPart(frame=0, nframes=4, video_start=1.0),
        "the beginning": VideoPart(frame=0, nframes=4, video_end=1.5),
        "smaller": VideoPart(frame=0, nframes=4, resized_height=56, resized_width=56),
        "smaller in all": VideoPart(frame=0, nframes=4, resized_height=56, resized_width=84),
    }
    for name, part in parts.items():
        rig.submit(name, [CLIP.data], messages=(ChatMessage("user", (part,)),))
    generated: dict[str, GenerateRequest] = {}
    async with asyncio.timeout(60):
        while len(generated) < len(parts):
            await asyncio.sleep(0.01)
            generated |= {message.request_id: message for message in rig.llm.take(GenerateRequest)}
    assert len({message.items[0].mm_hash for message in generated.values()}) == len(parts)
    assert [num_times(message) for _, message in sorted(generated.items())] == [2, 2, 2, 2, 2, 3]
    states = rig.core.chunks._chunks
    made = {name: [states[key].chunk for key in rig.core._requests.of(name).keys] for name in parts}
    frames = {name: [frame for chunk in found for frame in chunk.frames] for name, found in made.items()}
    assert frames["four"] == [0, 7, 15, 22]
    assert frames["the end"] == [10, 15, 20, 25]
    assert frames["the beginning"] == [0, 4, 8, 12]
    seen = {chunk.mm_hash: (chunk.frames, chunk.size) for chunk in itertools.chain(*made.values())}
    for chunk in itertools.chain(*made.values()):
        assert seen[chunk.mm_hash] == (chunk.frames, chunk.size), "one key, one content"
    for name in parts:
        rig.end(name)
    await rig.settle()


async def test_frames_given_as_pictures_arrive_each_at_its_place(rig: Rig) -> None:
    frames = [encode(scene(number)) for number in range(2)]
    video = VideoPart(frames=tuple(ImagePart(frame=number) for number in range(2)))
    rig.submit("r", frames, messages=(ChatMessage("user", (video,)),))
    await rig.settle()
    (message,) = [message for message in rig.encodes() if message.pixels is not None]
    pixels = rig.core.chunks._pool.array(message.pixels)
    for frame, data in zip(pixels, frames, strict=True):
        assert np.array_equal(frame, decode(data, ImageSize(*frame.shape[:2]), ""))
    rig.feedback(PixelsReleased, key=message.key)
    rig.end("r")
    rig.check_nothing_left()


async def test_no_frame_is_begun_after_a_broken_one(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [encode(noise(number, (140, 140))) for number in range(30)]
    frames[1] = frames[1][:20_000]
    video = VideoPart(frames=tuple(ImagePart(frame=number) for number in range(30)))
    begun, decode = [], PictureSource.decode

    async def counted(self: PictureSource, *args: Any) -> None:
        begun.append(self)
        await decode(self, *args)

    monkeypatch.setattr(PictureSource, "decode", counted)
    rig.core.chunks._max_decoding = 1
    rig.submit("r", frames, messages=(ChatMessage("user", (video,)),))
    await rig.settle()
    (refusal,) = rig.llm.take(RequestRefused)
    assert refusal.error.message == "the picture cannot be decoded"
    rig.end("r")
    await rig.settle()
    assert len(begun) < 20
    for vit in rig.vits:
        for message in vit.take(EncodeRequest):
            rig.feedback(PixelsReleased, key=message.key)
    rig.check_nothing_left()


async def test_a_text_waits_for_no_threads_of_media(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()

    def slow(data: bytes) -> bytes:
        goes_on.wait(30)
        return hashlib.sha256(data).digest()

    monkeypatch.setattr(item_reader, "_sha256", slow)
    rig.submit("many", [encode(scene(number)) for number in range(8)])
    await asyncio.sleep(1)
    rig.submit("text")
    await rig.until_told()
    assert [message.request_id for message in rig.llm.take(GenerateRequest)] == ["text"]
    goes_on.set()
    await rig.settle()
    assert [message.request_id for message in rig.llm.take(GenerateRequest)] == ["many"]
    for item in range(8):
        rig.feedback(PixelsReleased, key=ChunkKey("many", 1, item, 0))
    rig.end("text")
    rig.end("many")
    rig.check_nothing_left()


async def test_pictures_that_take_too_long_hold_up_neither_texts_nor_other_pictures() -> None:
    """Two of 64 million pixels each, in 200 KiB: before, every request waited for them.

    A fast machine decodes one in 0.5 s; a picture of one grey took it 0.15 s.
    """
    async with make_rig(1, picture_timeout_s=0.2) as rig:
        rig.submit("first", [encode(scene(1))])  # so that a process is there
        await rig.settle()
        rig.llm.take()
        gradient = Image.linear_gradient("L").resize((8000, 8000)).convert("RGB")
        rig.submit("bad", [encode(gradient)])
        rig.submit("worse", [encode(gradient.rotate(180))])
        async with asyncio.timeout(20):
            while not {"bad", "worse"} <= {message.request_id for message in rig.llm.sent}:
                await asyncio.sleep(0.01)
            rig.submit("text", [])
            while not any(message.request_id == "text" for message in rig.llm.take(GenerateRequest)):
                await asyncio.sleep(0.01)
            refused = rig.llm.take(RequestRefused)
            assert len(refused) < 2, "one is still being read: a busy machine may be done with the other"
            rig.submit("picture", [encode(scene(2))])
            while not any(m.pixels and m.key.request_id == "picture" for m in rig.encodes()):
                await asyncio.sleep(0.01)
            await rig.settle()
        refused += rig.llm.take(RequestRefused)
        refusals = {message.request_id: message.error for message in refused}
        assert set(refusals) == {"bad", "worse"}
        for error in refusals.values():
            assert (error.status, error.field) == (400, "messages[0].content[0].image_url")
            assert "more than 0.2 s of processor time" in error.message
        for name in ("first", "bad", "worse", "text", "picture"):
            rig.end(name)
            rig.feedback(PixelsReleased, key=ChunkKey(name, 1, 0, 0))
        rig.check_nothing_left()


async def test_what_a_uuid_names_need_not_be_sent_again(rig: Rig) -> None:
    def submit(request_id: str, pictures: list[bytes], uuid: str = "u", salt: bytes = b"") -> None:
        part = ImagePart(frame=0 if pictures else -1, uuid=uuid)
        rig.submit(request_id, pictures, messages=(ChatMessage("user", (part,)),), cache_salt=salt)

    submit("a", [encode(scene(1))])
    await rig.settle()
    submit("b", [])
    submit("other", [], uuid="v")
    submit("foreign", [], salt=b"s")
    await rig.settle()
    first, second = rig.llm.take(GenerateRequest)
    assert first.items == second.items
    refusals = rig.llm.take(RequestRefused)
    assert [(refusal.request_id, refusal.error.status) for refusal in refusals] == [
        ("other", 404),
        ("foreign", 404),
    ]
    rig.feedback(EncodeMiss, key=ChunkKey("b", 1, 0, 0))  # the ViT has let go of it
    await rig.settle()
    (refusal,) = rig.llm.take(RequestRefused)
    assert (refusal.request_id, refusal.error.status, refusal.error.field) == (
        "b",
        404,
        "messages[0].content[0].image_url.uuid",
    )
    submit("c", [encode(scene(1))])
    await rig.settle()
    rig.feedback(EncodeMiss, key=ChunkKey("c", 1, 0, 0))
    await rig.settle()
    assert [message.pixels is not None for message in rig.encodes() if message.key.request_id == "c"] == [
        False,
        True,
    ]
    for name in ("a", "b", "c", "other", "foreign"):
        rig.end(name)
        rig.feedback(PixelsReleased, key=ChunkKey(name, 1, 0, 0))
    rig.check_nothing_left()


async def submit_named(rig: Rig, request_id: str, picture: bytes | None, **fields: Any) -> bytes | int:
    """Key of the picture that a request with the uuid "logo" is about, or the status of its refusal."""
    part = ImagePart(frame=-1 if picture is None else 0, uuid="logo")
    rig.submit(
        request_id, [] if picture is None else [picture], messages=(ChatMessage("user", (part,)),), **fields
    )
    await rig.settle()
    answers: list[bytes | int] = [message.items[0].mm_hash for message in rig.llm.take(GenerateRequest)]
    answers += [message.error.status for message in rig.llm.take(RequestRefused)]
    rig.end(request_id)
    rig.feedback(PixelsReleased, key=ChunkKey(request_id, 1, 0, 0))
    return answers[0]


async def test_content_counts_whatever_was_sent_under_its_name_before(rig: Rig) -> None:
    blue, red = encode(scene(1)), encode(scene(2))
    first = await submit_named(rig, "a", blue)
    assert await submit_named(rig, "b", None) == first
    changed = await submit_named(rig, "c", red)
    assert changed != first
    assert await submit_named(rig, "d", None) == changed, "the name is what was sent last"
    rig.submit("e", [red])
    await rig.settle()
    (generate,) = rig.llm.take(GenerateRequest)
    assert generate.items[0].mm_hash == changed, "named or not, the same content has the same key"
    rig.end("e")
    rig.feedback(PixelsReleased, key=ChunkKey("e", 1, 0, 0))
    await rig.settle()


@pytest.mark.parametrize(
    ("mine", "others"),
    [
        ({"client_id": CLIENT}, {"client_id": OTHER}),
        ({"tenant": "key:1"}, {"tenant": "key:2"}),
        ({"tenant": "peer:10.0.0.1"}, {"tenant": "peer:10.0.0.2"}),
        ({"tenant": "peer:10.0.0.1"}, {}),
        ({"tenant": "key:1", "cache_salt": b"a"}, {"tenant": "key:1", "cache_salt": b"b"}),
        ({}, {"tenant": CLIENT.hex()}),
    ],
    ids=str,
)
async def test_a_name_is_its_tenants_own(rig: Rig, mine: dict[str, Any], others: dict[str, Any]) -> None:
    blue, red = encode(scene(1)), encode(scene(2))
    secret = await submit_named(rig, "a", blue, **mine)
    assert await submit_named(rig, "b", None, **others) == 404
    theirs = await submit_named(rig, "c", red, **others)
    assert theirs not in (404, secret)
    assert await submit_named(rig, "d", None, **mine) == secret
    assert await submit_named(rig, "e", None, **others) == theirs
    same = await submit_named(rig, "f", blue, **others)
    assert (same == secret) == (mine.get("cache_salt") == others.get("cache_salt")), (
        "content is shared by salt"
    )


async def test_a_client_that_comes_again_finds_the_names_of_its_tenant(rig: Rig) -> None:
    first = await submit_named(rig, "a", encode(scene(1)), tenant="curve:alice")
    assert await submit_named(rig, "b", None, tenant="curve:alice", client_id=OTHER) == first


async def test_a_url_that_has_not_changed_is_downloaded_again_only_on_a_miss() -> None:
    contents, asked = {"1": encode(scene(1))}, []

    async def handle(request: web.Request) -> web.StreamResponse:
        ((tag, data),) = contents.items()
        asked.append(request.headers.get("If-None-Match"))
        return (
            web.Response(status=304)
            if asked[-1] == f'"{tag}"'
            else web.Response(body=data, headers={"ETag": f'"{tag}"'})
        )

    application = web.Application()
    application.router.add_get("/picture", handle)
    async with make_rig(1, allow_private_media=True) as rig, TestServer(application) as server:

        async def submit(request_id: str) -> GenerateRequest:
            part = ImagePart(url=str(server.make_url("/picture")))
            rig.submit(request_id, messages=(ChatMessage("user", (part,)),))
            await rig.settle()
            (generate,) = rig.llm.take(GenerateRequest)
            return generate

        assert (await submit("a")).items == (await submit("b")).items
        assert asked == [None, '"1"']
        rig.encodes()
        rig.feedback(EncodeMiss, key=ChunkKey("b", 1, 0, 0))
        await rig.settle()
        assert asked == [None, '"1"', None]
        assert [message.pixels is not None for message in rig.encodes()] == [True]
        generate = await submit("c")
        contents.clear()
        contents["2"] = encode(scene(2))
        rig.feedback(EncodeMiss, key=ChunkKey("c", 1, 0, 0))  # and what comes now is something else
        await rig.settle()
        (refusal,) = rig.llm.take(RequestRefused)
        assert "changed while" in refusal.error.message
        assert (await submit("d")).items != generate.items
        for name in "abcd":
            rig.end(name)
            rig.feedback(PixelsReleased, key=ChunkKey(name, 1, 0, 0))
        rig.check_nothing_left()


async def test_the_same_bytes_are_one_picture_wherever_they_come_from(tmp_path: Path) -> None:
    data = encode(scene(1))
    (tmp_path / "a.png").write_bytes(data)

    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(body=data)

    application = web.Application()
    application.router.add_get("/picture", handle)
    async with (
        make_rig(1, allow_private_media=True, allowed_local_media_path=str(tmp_path)) as rig,
        TestServer(application) as server,
    ):
        parts = {
            "frame": ImagePart(frame=0),
            "base64": ImagePart(frame=1, is_base64=True),
            "url": ImagePart(url=str(server.make_url("/picture"))),
            "path": ImagePart(url=f"file://{tmp_path}/a.png"),
        }
        for name, part in parts.items():
            rig.submit(name, [data, base64.b64encode(data)], messages=(ChatMessage("user", (part,)),))
        await rig.settle()
        hashes = {message.request_id: message.items[0].mm_hash for message in rig.llm.take(GenerateRequest)}
        assert set(hashes) == set(parts)
        assert len(set(hashes.values())) == 1
        for name in parts:
            rig.end(name)
            rig.feedback(PixelsReleased, key=ChunkKey(name, 1, 0, 0))
        rig.check_nothing_left()


def with_palette(pixels: bytes, palette: list[int]) -> Image.Image:
    image = Image.frombytes("P", (64, 64), pixels)
    image.putpalette(palette)
    return image


async def test_pictures_that_differ_in_anything_seen_never_share_a_key(rig: Rig) -> None:
    pixels = bytes(number % 4 for number in range(64 * 64))
    greys, colours = (
        [value for index in range(256) for value in (255 - index,) * 3],
        [value for index in range(256) for value in (index, 0, 255)],
    )
    pictures = {
        "palette": encode(with_palette(pixels, greys)),
        "another palette": encode(with_palette(pixels, colours)),
        "the same bytes as grey": encode(Image.frombytes("L", (64, 64), pixels)),
        "the same bytes as colours": encode(Image.frombytes("RGB", (32, 32), pixels[: 32 * 32 * 3])),
        "the same bytes turned": encode(Image.frombytes("L", (32, 128), pixels)),
        "one value more": encode(Image.frombytes("L", (64, 64), b"\1" + pixels[1:])),
    }
    seen = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures.values()]
    assert len({(image.size, image.tobytes()) for image in seen}) == len(pictures)
    for name, data in pictures.items():
        rig.submit(name, [data])
    part = ImagePart(frame=0, min_pixels=19600)
    rig.submit("another size", [pictures["palette"]], messages=(ChatMessage("user", (part,)),))
    names = [*pictures, "another size"]
    await rig.settle()
    hashes = {message.request_id: message.items[0].mm_hash for message in rig.llm.take(GenerateRequest)}
    assert set(hashes) == set(names)
    assert len(set(hashes.values())) == len(names)
    for name in names:
        rig.end(name)
        rig.feedback(PixelsReleased, key=ChunkKey(name, 1, 0, 0))
    rig.check_nothing_left()


async def test_a_request_of_many_pictures_does_not_hold_up_one_of_one(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One decode goes on at a time; the single picture comes while the first of ten is being decoded."""
    rig.core.chunks._max_decoding = 1
    decoded: list[str] = []
    gate = asyncio.Semaphore(0)
    original = PictureSource.decode

    async def decode(self: PictureSource, *args: Any) -> None:
        await gate.acquire()
        await original(self, *args)

    monkeypatch.setattr(PictureSource, "decode", decode)
    rig.submit("many", [encode(noise(seed, (112, 112))) for seed in range(10)])
    await rig.settle()
    rig.submit("one", [encode(scene(1))])
    await rig.settle()
    for _ in range(11):
        gate.release()
        await asyncio.sleep(0.02)
        decoded += [message.key.request_id for message in rig.encodes() if message.pixels is not None]
    await rig.settle()
    decoded += [message.key.request_id for message in rig.encodes() if message.pixels is not None]
    assert len(decoded) == 11
    assert "one" in decoded[:3]
    for name, count in (("many", 10), ("one", 1)):
        for item in range(count):
            rig.feedback(PixelsReleased, key=ChunkKey(name, 1, item, 0))
        rig.end(name)
    gate.release()
    await rig.settle()
    rig.check_nothing_left()


@pytest.mark.parametrize(("is_cancelled", "is_patient"), [(False, True), (True, True), (False, False)])
async def test_pixels_go_in_the_order_of_the_request_whichever_are_there_first(
    is_cancelled: bool, is_patient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The LLM needs the first picture first; a ViT that has nothing to do would begin with what comes."""
    decode, order, goes_on = PictureSource.decode, [], asyncio.Event()

    async def slow_at_first(self: PictureSource, *args: Any) -> None:
        order.append(self)
        if self is order[0]:
            await goes_on.wait()
        await decode(self, *args)

    monkeypatch.setattr(PictureSource, "decode", slow_at_first)
    monkeypatch.setattr(chunks, "ORDER_PATIENCE_S", 60.0 if is_patient else 0.0)
    async with make_rig(1) as rig:
        rig.submit("r", [encode(scene(number)) for number in range(5)])
        await rig.settle()
        assert len(order) == 5, "hands are not idle meanwhile"
        if is_cancelled:
            rig.feedback(ItemNotNeeded, request_id="r", attempt=1, item=1)
            rig.feedback(PixelsReleased, key=ChunkKey("r", 1, 1, 0))
        goes_on.set()
        await rig.settle()
        sent = [message.key.item for message in rig.encodes() if message.pixels is not None]
        if is_patient:
            assert sent == ([0, 2, 3, 4] if is_cancelled else [0, 1, 2, 3, 4])
        else:
            assert sorted(sent) == [0, 1, 2, 3, 4]
            assert sent[-1] == 0, "the others did not wait for ever"
        for item in range(5):
            rig.feedback(PixelsReleased, key=ChunkKey("r", 1, item, 0))
        rig.end("r")
        rig.check_nothing_left()
        assert rig.core.chunks._last_sent == {}


async def test_a_request_is_remembered_while_a_chunk_of_it_is_decoded_to_no_purpose(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its id, used again, would take over the old chunk's slot."""
    goes_on, decode = asyncio.Event(), PictureSource.decode

    async def slow(self: PictureSource, *args: Any) -> None:
        await goes_on.wait()
        await decode(self, *args)

    monkeypatch.setattr(PictureSource, "decode", slow)
    rig.submit("r", [encode(scene(1))])
    await rig.settle()
    rig.end("r")
    rig.core._requests.of("r").ended_at = -1e9
    rig.core.tick(0.0)
    rig.submit("r", [encode(scene(2))])
    await rig.settle()
    assert not rig.encodes()[1:], "it is the ended one that is asked about, not a new one"
    rig.submit("r", [encode(scene(2))], attempt=2)
    goes_on.set()
    await rig.settle()
    assert [(message.key.attempt, message.pixels is not None) for message in rig.encodes()] == [
        (2, False),
        (2, True),
    ]
    rig.feedback(PixelsReleased, key=ChunkKey("r", 2, 0, 0))
    rig.end("r", 2)
    rig.check_nothing_left()


async def test_a_cancelled_chunk_in_the_queue_is_nobodys_turn(rig: Rig) -> None:
    rig.core.chunks._max_decoding = 0
    rig.submit("r", [encode(scene(1))])
    await rig.settle()
    rig.end("r")
    rig.core._requests._by_id.clear()  # forgotten: the same key comes again
    rig.submit("r", [encode(scene(2))])
    await rig.settle()
    rig.core.chunks._max_decoding = 2
    rig.core.chunks._grant()
    await rig.settle()
    assert rig.core.chunks.num_decoded == 1
    rig.feedback(PixelsReleased, key=ChunkKey("r", 1, 0, 0))
    rig.end("r")
    rig.check_nothing_left()


async def test_long_prompts_of_one_tenant_hold_up_nobody_elses(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, build = threading.Event(), rig.core.prompts.builder.build

    def slow(prompt: Any, segments: Any) -> Any:
        if prompt.messages[0].content == "long":
            goes_on.wait(30)
        return build(prompt, segments)

    monkeypatch.setattr(rig.core.prompts.builder, "build", slow)
    for number in range(20):
        rig.submit(f"long {number}", tenant="greedy", messages=(ChatMessage("user", "long"),))
    await asyncio.sleep(0.1)
    rig.submit("short", tenant="other")
    await rig.until_told()
    assert [message.request_id for message in rig.llm.take(GenerateRequest)] == ["short"]
    goes_on.set()
    await rig.settle()
    for name in ("short", *(f"long {number}" for number in range(20))):
        rig.end(name)
    rig.check_nothing_left()


async def test_texts_count_as_what_is_held() -> None:
    async with make_rig(1, max_open_media_mib=1) as rig:
        for number in range(3):
            rig.submit(f"r{number}", messages=(ChatMessage("user", (TextPart("a " * 200_000),)),))
        await rig.settle()
        refused = {message.request_id: message.error for message in rig.llm.take(RequestRefused)}
        assert refused["r2"].status in (429, 503)
        assert "texts and media" in refused["r2"].message
        for number in range(3):
            rig.end(f"r{number}")
        rig.check_nothing_left()


async def test_texts_count_as_they_lie_in_memory() -> None:
    """One emoji makes each letter of its text take four bytes."""
    async with make_rig(1, max_open_media_mib=1) as rig:
        for name, text in (("letters", "a " * 130_000), ("emoji", "a " * 130_000 + "\N{GRINNING FACE}")):
            rig.submit(name, messages=(ChatMessage("user", text),))
        refused = {message.request_id: message.error for message in rig.llm.take(RequestRefused)}
        assert list(refused) == ["emoji"]
        assert "texts and media" in refused["emoji"].message
        await rig.settle()
        for name in ("letters", "emoji"):
            rig.end(name)
        rig.check_nothing_left()


async def test_a_silent_host_holds_neither_slots_nor_decoders(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, load = asyncio.Event(), PictureSource.load
    names: list[PictureSource] = []

    async def slow(self: PictureSource, frames: Any) -> None:
        if not names:
            names.append(self)
            await goes_on.wait()
        await load(self, frames)

    monkeypatch.setattr(PictureSource, "load", slow)
    rig.submit("silent", [encode(scene(1))])
    await rig.settle()
    assert rig.allocator.num_used == 0
    assert not rig.core.chunks._decoding
    rig.submit("other", [encode(scene(2))])
    await rig.settle()
    assert [message.key.request_id for message in rig.encodes() if message.pixels] == ["other"]
    rig.end("silent")
    await rig.settle()
    goes_on.set()
    await rig.settle()
    assert rig.core.chunks.num_decoded == 1, "nobody waits for it any more"
    rig.feedback(PixelsReleased, key=ChunkKey("other", 1, 0, 0))
    rig.end("other")
    rig.check_nothing_left()


async def test_what_is_brought_in_again_for_nobody_is_not_brought_in() -> None:
    """A host that says that nothing has changed, and then stays silent: else it had any number of
    downloads."""
    is_asked, never = asyncio.Event(), asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        if "If-None-Match" in request.headers:
            return web.Response(status=304)
        if is_first.pop():
            return web.Response(body=encode(scene(1)), headers={"ETag": '"1"'})
        is_asked.set()
        await never.wait()
        return web.Response(status=404)

    is_first, application = [False, True], web.Application()
    application.router.add_get("/picture", handle)
    async with make_rig(1, allow_private_media=True) as rig, TestServer(application) as server:
        part = ImagePart(url=str(server.make_url("/picture")))
        for name in ("a", "b"):
            rig.submit(name, messages=(ChatMessage("user", (part,)),))
            await rig.settle()
        rig.feedback(PixelsReleased, key=ChunkKey("a", 1, 0, 0))
        rig.feedback(EncodeMiss, key=ChunkKey("b", 1, 0, 0))
        async with asyncio.timeout(10):
            await is_asked.wait()
        assert rig.allocator.num_used == 0, "no place in the pool waits for the host"
        assert not rig.core.fetcher._turns.is_idle
        rig.end("a")
        rig.end("b")
        async with asyncio.timeout(2):
            while not rig.core.fetcher._turns.is_idle:
                await asyncio.sleep(0.01)
        never.set()
        rig.check_nothing_left()


async def test_the_pictures_that_are_open_are_shared_by_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MAX_OPEN_CHUNKS", 8)
    async with make_rig(1) as rig:
        for number in range(4):
            rig.submit(f"r{number}", [encode(scene(number)), encode(scene(number + 4))], tenant="greedy")
            await rig.settle()
        (refusal,) = rig.llm.take(RequestRefused)
        assert (refusal.request_id, refusal.error.status) == ("r3", 429)
        rig.submit("text", tenant="greedy")
        rig.submit("other", [encode(scene(9))], tenant="other")
        await rig.settle()
        served = [message.request_id for message in rig.llm.take(GenerateRequest)]
        assert sorted(served) == ["other", "r0", "r1", "r2", "text"], "before, the greedy one had all"
        rig.submit("third", [encode(scene(10)), encode(scene(11))], tenant="third")
        await rig.settle()
        (refusal,) = rig.llm.take(RequestRefused)
        assert (refusal.request_id, refusal.error.status) == ("third", 503)
        for key in list(rig.core.chunks._chunks):
            rig.feedback(PixelsReleased, key=key)
        for name in (*served, "r3", "third"):
            rig.end(name)
        rig.check_nothing_left()


async def test_a_tenant_leaves_decoders_to_others(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, decode, begun = asyncio.Event(), PictureSource.decode, []

    async def slow(self: PictureSource, *args: Any) -> None:
        begun.append(self)
        await goes_on.wait()
        await decode(self, *args)

    monkeypatch.setattr(PictureSource, "decode", slow)
    for number in range(10):
        rig.submit(f"r{number}", [encode(scene(number))], tenant="greedy")
    await rig.settle()
    of_greedy = len(begun)
    rig.submit("other", [encode(scene(11))], tenant="other")
    await rig.settle()
    assert len(begun) == of_greedy + 1, "before, it waited until one of them had ended"
    goes_on.set()
    await rig.settle()
    for name in ("other", *(f"r{number}" for number in range(10))):
        rig.feedback(PixelsReleased, key=ChunkKey(name, 1, 0, 0))
        rig.end(name)
    rig.check_nothing_left()


async def test_a_chunk_cancelled_before_its_turn_is_never_decoded(rig: Rig) -> None:
    rig.core.chunks._max_decoding = 0
    rig.submit("r", [encode(scene(seed)) for seed in range(5)])
    await rig.settle()
    assert rig.allocator.num_used == 5
    rig.end("r")
    rig.check_nothing_left()
    rig.core.chunks._max_decoding = 2
    rig.submit("s", [encode(scene(9))])
    await rig.settle()
    assert rig.core.chunks.num_decoded == 1
    rig.feedback(PixelsReleased, key=ChunkKey("s", 1, 0, 0))
    rig.end("s")
    rig.check_nothing_left()


async def test_more_than_the_context_holds_is_refused_before_anything_is_announced(rig: Rig) -> None:
    rig.submit("r", [encode(noise(seed, (140, 140))) for seed in range(60)])
    info = rig.core.prompts._info
    rig.core.prompts._info = dataclasses.replace(
        info, text=dataclasses.replace(info.text, max_position_embeddings=1000)
    )
    await rig.settle()
    (refusal,) = rig.llm.take(RequestRefused)
    assert refusal.error.code == "context_length_exceeded"
    assert refusal.error.message.startswith("This model's maximum context length is 1000 tokens.")
    assert "at least 1500 in the messages" in refusal.error.message
    assert rig.encodes() == []
    rig.end("r")
    rig.check_nothing_left()


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (ImagePart(frame=0, uuid="u" * 300), "at most 256 characters"),
        (
            VideoPart(frames=(ImagePart(url="http://x/y"),) * 1025),
            "1025 pictures and frames, the limit is 1024",
        ),
        (VideoPart(frames=(ImagePart(frame=0, max_pixels=12544),)), "those of the video"),
        (VideoPart(frames=(ImagePart(frame=0),), uuid="u"), "has no uuid"),
        (VideoPart(frame=0, max_frames=1), "max_frames must be at least 2"),
        (VideoPart(frame=0, nframes=4, fps=1.0), "exclude each other"),
        (ImagePart(frame=0, max_pixels=0), "max_pixels must be at least 1"),
    ],
)
async def test_parts_that_cannot_be_are_refused(rig: Rig, part: ImagePart | VideoPart, words: str) -> None:
    rig.submit("r", [encode(scene(1))], messages=(ChatMessage("user", (part,)),))
    await rig.settle()
    (refusal,) = rig.llm.take(RequestRefused)
    assert (refusal.error.status, words in refusal.error.message) == (400, True), refusal.error.message
    rig.end("r")
    rig.check_nothing_left()


@pytest.mark.parametrize(
    "part",
    [
        ImagePart(url=f"http://x/{'y' * MAX_URL}"),
        VideoPart(url="x" * MAX_URL),
        VideoPart(frames=(ImagePart(url="x"),)),
    ],
)
async def test_a_url_that_is_none_is_not_hashed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, part: ImagePart | VideoPart
) -> None:
    hashed: list[str] = []
    monkeypatch.setattr(item_reader, "_key", lambda scope, kind, what, name: hashed.append(name))
    rig.submit("r", messages=(ChatMessage("user", (part,)),))
    await rig.settle()
    (refusal,) = rig.llm.take(RequestRefused)
    assert (refusal.error.status, hashed) == (400, [])
    rig.end("r")
    rig.check_nothing_left()


async def test_media_that_cannot_be_read_for_no_fault_of_theirs_end_their_request_only(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def decode(self: PictureSource, *args: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(PictureSource, "decode", decode)
        rig.submit("r", [encode(scene(1))])
        await rig.settle()
    (refusal,) = rig.llm.take(RequestRefused)
    assert (refusal.error.status, "disk" in refusal.error.message) == (500, False)
    rig.end("r")
    rig.check_nothing_left()
    rig.submit("s", [encode(scene(2))])
    await rig.settle()
    assert len(rig.llm.take(GenerateRequest)) == 2
    rig.feedback(PixelsReleased, key=ChunkKey("s", 1, 0, 0))
    rig.end("s")
    rig.check_nothing_left()


# The death of neighbours.


def states(rig: Rig, **ready: bool) -> list[WorkerState]:
    workers = [VIT_0, WorkerId(Role.VIT, 1), *(WorkerId(Role.LLM, lead) for lead in rig.llms)]
    return [WorkerState(worker, 1, ready.get(f"{worker.role}_{worker.rank}", True)) for worker in workers]


async def test_pixels_that_a_carrier_has_copied_free_their_slot_and_can_still_be_cancelled() -> None:
    """ViT 1 and its group are on another node."""
    spec = NodeSpec(node=0, vits_per_node=1, ranks_per_node=1, own=KeyPair(b"", b""))
    async with make_rig(2, leads=(1,), nodes=spec) as rig:
        carrier, far = WorkerId(Role.CARRIER, 1), WorkerId(Role.VIT, 1)
        rig.context.sockets.epochs.update({carrier: 3, WorkerId(Role.CARRIER): 2})
        rig.core.on_states([WorkerState(worker, 1, True) for worker in (far, WorkerId(Role.LLM, 1))], [])
        rig.submit("r", [encode(scene(1)), encode(scene(2))])
        await rig.settle()
        (generate,) = rig.llm.take(GenerateRequest)
        chunks = [chunk for item in generate.items for chunk in item.chunks]
        assert [(chunk.vit, chunk.carriers) for chunk in chunks] == [(1, (Via(0, 2), Via(1, 3)))] * 2
        keys = sorted({message.key for message in rig.encodes()})
        assert rig.allocator.num_used == 2
        for _ in range(2):
            rig.feedback(PixelsCopied, key=keys[0])
        assert rig.allocator.num_used == 1
        rig.feedback(EncodeMiss, key=keys[0])
        assert rig.encodes() == [], "the carrier has them"
        rig.end("r")
        (cancelled,) = rig.vits[1].take(CancelEncode)
        assert sorted(cancelled.keys) == keys
        for key in keys:
            rig.feedback(PixelsReleased, key=key)
        rig.check_nothing_left()


async def test_with_a_carrier_goes_what_is_on_the_way_to_the_vits_of_its_node() -> None:
    spec = NodeSpec(node=0, vits_per_node=1, ranks_per_node=1, own=KeyPair(b"", b""))
    async with make_rig(2, leads=(1,), nodes=spec) as rig:
        far = WorkerId(Role.VIT, 1)
        rig.core.on_states([WorkerState(worker, 1, True) for worker in (far, WorkerId(Role.LLM, 1))], [])
        rig.submit("r", [encode(scene(1))])
        await rig.settle()
        rig.vits[1].take()
        for node in (0, 1):
            assert rig.allocator.num_used == 1, "the successor of the head's carrier reads them"
            rig.core.on_states([], [WorkerState(WorkerId(Role.CARRIER, node), 2, False)])
        assert rig.allocator.num_used == 0
        (opened,) = rig.vits[1].take(PoolOpened)
        assert opened.receiver_epoch == 1, "the ViT lives"
        rig.end("r")
        rig.check_nothing_left()


async def test_with_a_vit_go_its_chunks_and_the_memory_of_where_hashes_are(rig: Rig) -> None:
    pictures = [encode(scene(number)) for number in range(4)]
    rig.submit("r", pictures)
    await rig.settle()
    rig.llm.take()
    first = rig.encodes()
    assert rig.allocator.num_used == 4
    dead = WorkerState(VIT_0, 2, False)
    rig.context.sockets.epochs[VIT_0] = 2
    rig.core.on_states(states(rig, vit_0=False), [dead])
    assert rig.allocator.num_used == 2
    assert isinstance(rig.vits[0].sent[0], PoolOpened), (
        "its successor must know our pool before any handle of it"
    )
    rig.submit("r", pictures, attempt=2)
    await rig.settle()
    (again,) = rig.llm.take(GenerateRequest)
    assert {chunk.vit for item in again.items for chunk in item.chunks} == {1}, (
        "nobody is sent where nobody serves"
    )
    rig.core.on_states(states(rig), [])
    rig.submit("s", [encode(scene(9))])
    await rig.settle()
    (chunk,) = rig.llm.take(GenerateRequest)[0].items[0].chunks
    assert (chunk.vit, chunk.vit_epoch) == (0, 2)
    for request_id, attempt in (("r", 2), ("s", 1)):
        rig.end(request_id, attempt)
    for message in [*first, *rig.encodes()]:
        rig.core.on_feedback(PixelsReleased(sender=VIT_0, epoch=2, key=message.key))
    rig.check_nothing_left()


async def test_with_a_group_go_its_requests_and_they_come_again_elsewhere() -> None:
    async with make_rig(2, leads=(0, 2)) as rig:
        rig.submit("r", [encode(scene(1))])
        await rig.settle()
        (lead,) = [lead for lead, llm in rig.llms.items() if llm.take(GenerateRequest)]
        dead = WorkerState(WorkerId(Role.LLM, lead), 2, False)
        rig.core.on_states(states(rig, **{f"llm_{lead}": False}), [dead])
        for vit in rig.vits:
            for message in vit.take(CancelEncode):
                for key in message.keys:
                    rig.feedback(PixelsReleased, key=key)
        rig.check_nothing_left()
        rig.submit("r", [encode(scene(1))], attempt=2, lead=lead)
        await rig.settle()
        (other,) = [lead for lead, llm in rig.llms.items() if llm.take(GenerateRequest)]
        assert other != lead
        rig.end("r", 2)
        for vit in rig.vits:
            for message in vit.take(EncodeRequest):
                rig.feedback(PixelsReleased, key=message.key)


async def test_a_query_about_what_went_through_our_predecessor_reaches_its_group() -> None:
    async with make_rig(1, leads=(0, 2)) as rig:
        rig.query("r", attempt=3, num_received=(5,), lead=2)
        (query,) = rig.llms[2].take(QueryRequest)
        assert (query.request_id, query.attempt, query.num_received) == ("r", 3, (5,))
        rig.core.on_ingest(AbortRequest(client_id=CLIENT, request_id="r", attempt=3, lead=2), [])
        assert len(rig.llms[2].take(AbortRequest)) == 1
        assert rig.llms[0].sent == []
        rig.check_nothing_left()


async def test_after_our_predecessors_death_no_group_goes_on_with_an_attempt_before() -> None:
    async with make_rig(1, leads=(0, 2)) as rig:
        rig.submit("r", attempt=2)
        await rig.settle()
        assert [llm.sent[0].attempt for llm in rig.llms.values()] == [1, 1]
        assert sum(len(llm.take(GenerateRequest)) for llm in rig.llms.values()) == 1
        rig.end("r", 2)


@pytest.mark.parametrize("end", ["it ended", "it was aborted", "it was refused"])
async def test_no_word_of_a_client_takes_what_is_over_past_the_load_check(end: str) -> None:
    async with make_rig(1, max_open_requests=1) as rig:
        rig.submit("r", priority=1 if end == "it was refused" else 0)
        if end == "it was aborted":
            rig.core.on_ingest(AbortRequest(client_id=CLIENT, request_id="r", attempt=1), [])
        await rig.settle()
        if end == "it ended":
            rig.end("r")
        rig.submit("other")
        await rig.settle()
        assert rig.core.num_open == 1, "the server is full now"
        rig.llm.take()
        rig.submit("r", attempt=2)
        await rig.settle()
        (refusal,) = rig.llm.take()
        assert (refusal.request_id, refusal.error.status) == ("r", 429)
        rig.end("other")
        rig.check_nothing_left()


async def test_a_group_that_reads_nothing_ends_requests_and_not_preprocess(rig: Rig) -> None:
    """It loads for minutes, and somebody submits and aborts all the while."""
    rig.submit("running")
    await rig.settle()
    rig.llm.take()
    rig.llm.room = 0
    rig.submit("r")
    rig.submit("aborted")
    rig.submit("wrong", priority=1)
    rig.submit("running", client_id=OTHER)
    rig.core.on_ingest(AbortRequest(client_id=CLIENT, request_id="aborted", attempt=1), [])
    rig.core.on_ingest(Hello(client_id=CLIENT, protocol=1), [])
    rig.query("r")  # is being prepared
    await rig.settle()
    for name in ("running", "wrong", "gone"):
        rig.query(name)
    assert rig.llm.sent == []
    rig.llm.room = None
    rig.query("r")
    rig.query("wrong")
    assert [(m.request_id, m.error.status) for m in rig.llm.take(RequestRefused)] == [
        ("r", 503),
        ("wrong", 400),
    ]
    rig.end("running")
    rig.check_nothing_left()


async def test_a_refusal_that_was_lost_is_repeated_for_a_running_request(rig: Rig) -> None:
    """Else it would wait for its picture for ever."""
    rig.llm.room = 1
    rig.submit("r", [encode(noise(1, (140, 140)))[:20_000]])
    await rig.settle()
    assert [type(message) for message in rig.llm.take()] == [GenerateRequest]
    rig.llm.room = None
    rig.query("r")
    (refusal,) = rig.llm.take()
    assert (type(refusal), refusal.error.status) == (RequestRefused, 400)
    rig.end("r")
    rig.query("r", attempt=2)
    assert [type(message) for message in rig.llm.take()] == [QueryRequest]
    rig.check_nothing_left()


@pytest.mark.parametrize("room", [0, 1, 2, 3], ids="room for {} messages".format)
async def test_a_vit_that_reads_nothing_ends_requests_and_not_preprocess(room: int) -> None:
    """What it has read of them by then, it is to forget: it would wait for pixels that never come."""
    async with make_rig(1) as rig:
        (vit,) = rig.vits
        vit.room = room
        rig.submit("r", [encode(scene(1)), encode(scene(2))])
        await rig.settle()
        assert len(rig.llm.take(GenerateRequest)) == 1
        refusals = rig.llm.take(RequestRefused)
        assert {(m.request_id, m.error.status) for m in refusals} == {("r", 503)}
        rig.end("r")
        asked = rig.encodes()
        assert vit.take(CancelEncode) == []
        vit.room = None
        rig.core.tick(0.0)
        cancelled = {key for message in vit.take(CancelEncode) for key in message.keys}
        assert cancelled >= {message.key for message in asked}
        for message in asked:
            if message.pixels is not None:
                rig.feedback(PixelsReleased, key=message.key)
        rig.check_nothing_left()


async def test_pixels_that_find_no_room_after_a_miss_end_their_request() -> None:
    async with make_rig(1) as rig:
        rig.submit("r", [encode(scene(1))])
        await rig.settle()
        (key,) = {message.key for message in rig.encodes()}
        rig.llm.take()
        rig.vits[0].room = 0
        rig.feedback(EncodeMiss, key=key)
        (refusal,) = rig.llm.take()
        assert refusal.error.status == 503
        rig.end("r")
        rig.check_nothing_left()


async def test_a_suspect_is_alone_with_its_texts_and_pictures(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever attempt it is: that is the client's word."""
    seen: set[tuple[str, bool]] = set()
    error_of, read_request = chunks.ChunkFlow._error_of, PromptReader.read

    async def read(self: Any, *args: Any) -> Any:
        seen.add(("text", on_behalf_of.get().is_alone))
        return await read_request(self, *args)

    async def work(self: Any, state: Any, work: Any) -> Any:
        error = await error_of(self, state, work)
        seen.add(("picture", on_behalf_of.get().is_alone))
        return error

    monkeypatch.setattr(PromptReader, "read", read)
    monkeypatch.setattr(chunks.ChunkFlow, "_error_of", work)
    rig.context.quarantine.learn({Role.PREPROCESS: (digest_of("p"),), Role.LLM: (digest_of("l"),)})
    for number, (name, attempt) in enumerate((("p", 1), ("l", 2), ("other", 2))):
        rig.submit(name, [encode(scene(20 + number))], attempt=attempt)
        await rig.settle()
        assert seen == {("text", name == "p"), ("picture", name == "p")}
        seen.clear()
        rig.end(name, attempt)
        for message in rig.encodes():
            rig.feedback(PixelsReleased, key=message.key)


# Groups that live, and clients that they know.


def submission(**fields: Any) -> SubmitRequest:
    chat = Chat((ChatMessage("user", fields.pop("content", "Hello")),))
    values = {"request_id": "r", "attempt": 1, "prompt": chat, "sampling": SamplingParams(), **fields}
    return SubmitRequest(client_id=CLIENT, **values)


async def test_a_request_goes_only_to_groups_that_know_its_client() -> None:
    async with make_rig(1, leads=(0, 2)) as rig:
        for number in range(6):
            rig.core.on_ingest(submission(request_id=f"r{number}", leads=(2,)), [])
        await rig.settle()
        assert [len(llm.take(GenerateRequest)) for llm in rig.llms.values()] == [0, 6]
        for number in range(6):
            rig.end(f"r{number}")


async def test_of_a_dead_group_a_living_one_takes_over_before_the_death_is_known_here() -> None:
    """The client may hear of it before us.

    Its word counts, and the dead group is told to forget the attempt before.
    """
    async with make_rig(1, leads=(0, 2)) as rig:
        rig.core.on_ingest(submission(leads=(0, 2)), [])
        await rig.settle()
        (lead,) = [lead for lead, llm in rig.llms.items() if llm.take(GenerateRequest)]
        other = 2 - lead
        rig.core.on_ingest(submission(attempt=2, leads=(other,), lead=None), [])
        await rig.settle()
        assert [message.attempt for message in rig.llms[lead].take(AbortRequest)] == [1]
        assert len(rig.llms[other].take(GenerateRequest)) == 1
        dead = WorkerState(WorkerId(Role.LLM, lead), 2, False)
        rig.core.on_states(states(rig, **{f"llm_{lead}": False}), [dead])
        assert rig.core.num_open == 1, "the death touches it no longer"
        rig.end("r", 2)


async def test_a_refusal_is_told_by_a_group_that_lives() -> None:
    async with make_rig(1, leads=(0, 2)) as rig:
        rig.core.on_states(states(rig, llm_0=False), [])
        rig.core.on_ingest(submission(content=(ImagePart(url="ftp://nowhere/x"),)), [])
        await rig.settle()
        assert rig.llms[0].sent == []
        assert [message.error.status for message in rig.llms[2].take(RequestRefused)] == [400]
        rig.end("r")


async def test_nothing_stays_open_when_the_group_that_would_say_so_is_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Requests that are aborted while they are prepared, or refused, have no group: no death ended them."""
    async with make_rig(1, leads=(0, 2)) as rig:
        goes_on, build = threading.Event(), rig.core.prompts.builder.build

        def slow(prompt: Any, segments: Any) -> Any:
            goes_on.wait(30)
            return build(prompt, segments)

        monkeypatch.setattr(rig.core.prompts.builder, "build", slow)
        rig.submit("aborted")
        rig.core.on_ingest(AbortRequest(client_id=CLIENT, request_id="aborted", attempt=1), [])
        rig.submit("refused", messages=())
        goes_on.set()
        await rig.settle()
        for lead in (0, 2):
            dead = WorkerState(WorkerId(Role.LLM, lead), 2, False)
            rig.core.on_states(states(rig, **{f"llm_{lead}": False}), [dead])
        rig.check_nothing_left()


async def test_a_query_about_what_is_being_prepared_is_answered() -> None:
    async with make_rig(1, leads=(0, 2)) as rig:
        rig.core.on_states(states(rig, llm_0=False), [])
        waiting = asyncio.Event()

        async def read(*_: Any) -> Any:
            await waiting.wait()
            raise RequestError("the media did not come", field="messages")

        rig.core.prompts.read = read  # type: ignore[method-assign]
        request = submission(leads=(2,))
        rig.core.on_ingest(request, [])
        await rig.settle()
        rig.query("r")
        (preparing,) = rig.llms[2].take(Preparing)
        assert (preparing.client_id, preparing.request_id, preparing.attempt) == (CLIENT, "r", 1)
        waiting.set()
        await rig.settle()
        assert len(rig.llms[2].take(RequestRefused)) == 1
        rig.query("r")
        assert rig.llms[2].take(Preparing) == [], "it has failed, which is told again"
        assert len(rig.llms[2].take(RequestRefused)) == 1
        rig.end("r")


async def test_a_query_about_what_a_groups_death_ended_makes_its_client_submit_again() -> None:
    async with make_rig(1, leads=(0, 2)) as rig:
        request = submission(lead=0)
        rig.core.prompts.read = lambda *_: asyncio.Event().wait()  # type: ignore[assignment,method-assign]
        rig.core.on_ingest(request, [])
        await rig.settle()
        rig.core.on_states(states(rig, llm_0=False), [WorkerState(LLM_0, 2, False)])
        rig.query("r")
        assert len(rig.llms[2].take(QueryRequest)) == 1
        assert rig.core.num_open == 0
