"""Rank 0's core with a real model and real pools, in one process; the tests are its neighbours."""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image

from pipeline.config import Config, LlmConfig, ModelConfig
from pipeline.families import ImageSize, ModelInfo, PlacedMedia, SampledFrames, read_model_info
from pipeline.process.metrics import Metrics
from pipeline.transport.ends import Subscription
from pipeline.transport.slots import SlotAllocator, align
from pipeline.transport.tensors import TensorPool
from pipeline.wire.base import ChunkKey, PoolOpened
from pipeline.wire.clients import PROTOCOL_VERSION, Hello, RequestOutput, TokenOutputs, Welcome
from pipeline.wire.generation import EmbeddingReady, GenerateRequest, MmChunk, MmItem
from pipeline.wire.packing import pack_int32, unpack_int32
from pipeline.wire.prompts import Chat, Part, TextPart, VideoPart
from pipeline.wire.sampling import SamplingParams
from tests.chats import ChatTurns, to_messages
from tests.fakes import CARRIER_0, LLM_0, PREPROCESS, VIT_0, FakePublisher, FakeSink
from tests.pictures import seen_size
from workers.llm.cache.manager import CacheManager
from workers.llm.cache.spec import states_of
from workers.llm.engine import Engine, Links
from workers.llm.model_runner import ModelRunner
from workers.llm.parallel import TensorParallel
from workers.llm.scheduler import Scheduler
from workers.llm.speculation.drafter import Drafter
from workers.llm.start import make_drafter, turn_start_id
from workers.llm.stepping import Watch
from workers.nn.weights.registry import open_weights
from workers.preprocess.geometry import chosen_frames, video_frame_size
from workers.preprocess.images import decode, read_size
from workers.preprocess.media import Item, MediaChunk, Source, picture_item, video_item
from workers.preprocess.prompt import PromptBuilder
from workers.preprocess.video_files import open_video
from workers.vit.engines.torch import TorchEngine
from workers.vit.models.base import EncodeJob
from workers.vit.models.registry import tower_of

CLIENT = b"c" * 16
NUM_TOKENS = 24
CPU = torch.device("cpu")
MAX_PIXELS = 10**9  # of a file
MAX_DRAFTS = 63  # of a step
USES_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


def few_splits() -> Any:
    """Triton's attention warms up for each number of splits; in the interpreter all of them take seconds."""
    return mock.patch("workers.llm.attention.triton.MAX_SPLITS", 2) if USES_INTERPRETER else nullcontext()


class NoSource:
    """Of chunks whose pixels the rig has itself."""

    async def load(self, frames: object) -> None:
        raise AssertionError("nothing is to be loaded")

    async def decode(self, frames: object, out: object, offset: int) -> None:
        raise AssertionError("nothing is to be decoded")


NO_SOURCE: Source = NoSource()


class Seen(NamedTuple):
    """An item, and the pixels [frames, height, width, 3] of all its frames in order."""

    item: Item
    frames: np.ndarray

    def pixels(self, chunk: MediaChunk) -> np.ndarray:
        number = next(index for index, one in enumerate(self.item.chunks) if one is chunk)
        start = sum(len(before.frames) for before in self.item.chunks[:number])
        return np.array(self.frames[start : start + len(chunk.frames)])


def resized(frame: np.ndarray, size: ImageSize) -> Image.Image:
    return Image.fromarray(frame).resize((size.width, size.height), Image.Resampling.BICUBIC)


class Rig:
    """An engine with a pool of embeddings beside it, and what its neighbours were told."""

    def __init__(
        self,
        folder: Path,
        budget: int,
        block_size: int = 16,
        num_blocks: int = 600,
        has_overlap: bool = False,
        attention: str = "torch",
        linear_attention: str = "auto",
        num_vits: int = 1,
        drafter: Drafter | None = None,
        num_snapshots: int = 0,
        speculative: str = "none",
        lora: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        self.info: ModelInfo = read_model_info(folder)
        self.num_vits = num_vits  # over which chunks of a video are spread
        llm = LlmConfig(
            block_size=block_size, attention=attention, linear_attention=linear_attention,
            speculative=speculative, **options,
        )  # fmt: skip
        config = Config(model=ModelConfig(dtype="float32", lora=lora), llm=llm)
        runner = ModelRunner.load(self.info, config, folder, CPU, TensorParallel(), lambda done, total: None)
        with few_splits():
            runner.open_cache(num_blocks, 1000, num_snapshots=num_snapshots, num_drafts=MAX_DRAFTS)
        decoder = runner.decoder
        self.scheduler = Scheduler(
            CacheManager.of_size(
                num_blocks, block_size, 8, bool(states_of(decoder.cache_spec())), num_snapshots
            ),
            budget,
            self.info.eos_token_ids,
            drafter=drafter or make_drafter(config.llm),
            prefill_multiple=decoder.prefill_multiple,
            turn_start_id=turn_start_id(folder),
        )
        self.publisher, self.feedback, self.vit = FakePublisher(), FakeSink(), FakeSink()
        self.carrier = FakeSink()
        self.ranks_keep_up = True
        self.clock: Callable[[], float] = time.monotonic
        self.records: list[set[str]] = []
        self.metrics = Metrics()
        self.first_tokens: list[str] = []  # of these requests
        welcome = Welcome(
            sender=LLM_0, epoch=1, protocol=PROTOCOL_VERSION, model_folder="", tokenizer_hash=b"",
            model_name="m",
            max_model_len=1000, max_requests=9, max_request_bytes=9,
        )  # fmt: skip
        self.engine = Engine(
            {"sender": LLM_0, "epoch": 1},
            self.scheduler,
            runner,
            welcome,
            Links(
                publish=self.publisher,
                feedback=self.feedback,
                vits=[self.vit],
                carrier=(CARRIER_0, self.carrier),
                publish_step=self.publish_step,
                on_first_token=self.first_tokens.append,
            ),
            has_overlap=has_overlap,
            adapters=runner.adapters,
            watch=Watch(
                clock=lambda: self.clock(),
                record=lambda ids: self.records.append(set(ids)),
                metrics=self.metrics,
            ),
        )
        self.now = 0.0
        self.greet(CLIENT)
        vision = self.info.vision
        self.encoder = TorchEngine(
            tower_of(self.info).encoder(vision, open_weights(folder, torch.float32, CPU))
        )
        self.slots = SlotAllocator(16 << 20, 1 << 20, 64)
        self.pool = TensorPool.on_host("vit.0", 1, 16 << 20, 64)
        self.prompt = PromptBuilder(folder, self.info.image_token_id, self.info.video_token_id)
        self.lease_ids = itertools.count(1)

    def publish_step(self, message: object) -> bool:
        return self.ranks_keep_up

    def greet(self, client_id: bytes) -> None:
        self.engine.on_subscriptions([Subscription(client_id, True)], self.now)
        self.engine.handle(Hello(client_id=client_id, protocol=PROTOCOL_VERSION), self.now)
        self.publisher.take(Welcome)

    def open_pool(self) -> None:
        self.engine.handle(PoolOpened(sender=VIT_0, epoch=1, pool=self.pool.info), self.now)

    def request(
        self, chat: ChatTurns, request_id: str, **options: object
    ) -> tuple[GenerateRequest, list[EmbeddingReady]]:
        """A request's metadata, and its embeddings as a ViT would send them."""
        messages, frames = to_messages(chat)
        seen = [self._see(part, frames) for message in messages for part in message.content]
        medias = [media for media in seen if media is not None]
        built = self.prompt.build(Chat(tuple(messages)), [media.item.segments for media in medias])
        placed = [
            PlacedMedia(media.item.media, spans) for media, spans in zip(medias, built.spans, strict=True)
        ]
        positions = self.info.family.positions(len(built.token_ids), placed, self.info)
        items: list[MmItem] = []
        ready: list[EmbeddingReady] = []
        for number, (media, spans) in enumerate(zip(medias, built.spans, strict=True)):
            item, chunks = media.item, []
            for index, chunk in enumerate(item.chunks):
                key = ChunkKey(request_id, 1, number, index)
                ready.append(self._encode(chunk, media.pixels(chunk), key))
                num_rows = self.info.vision.num_tokens(chunk.grid_thw)
                chunks.append(MmChunk(chunk.mm_hash, num_rows, 0, 1))
            items.append(MmItem(spans, item.mm_hash, item.kv_hash, tuple(chunks)))
        sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, seed=1)
        fields = {"sampling": sampling, "attempt": 1, **options}
        message = GenerateRequest(
            sender=PREPROCESS, epoch=1, client_id=CLIENT, request_id=request_id, arrival=1,
            prompt_token_ids=pack_int32(built.token_ids),
            positions=pack_int32(positions.rows), position_delta=positions.delta,
            **{"items": tuple(items), **fields},
        )  # fmt: skip
        return message, ready

    def _see(self, part: Part, frames: list[bytes]) -> Seen | None:
        if isinstance(part, TextPart):
            return None
        if isinstance(part, VideoPart):
            return self._see_video(part, frames)
        data = frames[part.frame]
        size = seen_size(read_size(data, MAX_PIXELS, ""), self.info)
        item = picture_item(NO_SOURCE, size, hashlib.sha256(data).digest(), self.info)
        return Seen(item, np.asarray(decode(data, size, ""))[None])

    def _see_video(self, part: VideoPart, frames: list[bytes]) -> Seen:
        if part.frames:
            listed = [frames[picture.frame] for picture in part.frames]
            source = [np.asarray(decode(one, read_size(one, MAX_PIXELS, ""), "")) for one in listed]
            seen = SampledFrames(tuple(range(len(source))), len(source), part.fps, part.timestamps)
            content = hashlib.sha256(b"".join(listed)).digest()
        else:
            data = frames[part.frame]
            content = hashlib.sha256(data).digest()
            with tempfile.NamedTemporaryFile() as file:
                Path(file.name).write_bytes(data)
                video = open_video(file.name, "pyav", MAX_PIXELS)
                seen = chosen_frames(part, video.metadata, self.info, self.info.video.max_frames, "")
                source = list(video.frames(seen.numbers))
        size = video_frame_size(part, ImageSize(*source[0].shape[:2]), len(source), self.info, "")
        item = video_item(NO_SOURCE, seen, size, content, self.info, self.num_vits)
        return Seen(item, np.stack([np.asarray(resized(frame, size)) for frame in source]))

    def _encode(self, chunk: MediaChunk, pixels: np.ndarray, key: ChunkKey) -> EmbeddingReady:
        embedding = self.info.vision.embedding(chunk.grid_thw, "float32")
        slot = self.slots.allocate(align(embedding.nbytes))
        assert slot is not None
        handle = self.pool.lend(slot, embedding.shape, "float32")
        self.encoder.encode([EncodeJob(torch.from_numpy(pixels), chunk.grid_thw, self.pool.tensor(handle))])
        return EmbeddingReady(
            sender=VIT_0,
            epoch=1,
            key=key,
            lease_id=next(self.lease_ids),
            embeddings=handle,
            was_encoded=True,
        )

    def run(self) -> None:
        while self.engine.step(self.now):
            self.engine.check_integrity()

    def outputs(self) -> list[RequestOutput]:
        return [output for message in self.publisher.take(TokenOutputs) for output in message.outputs]

    def tokens(self, request_id: str) -> list[int]:
        mine = [output for output in self.outputs() if output.request_id == request_id]
        for before, after in itertools.pairwise(mine):
            assert after.offset == before.offset + len(before.new_token_ids) // 4
        assert [output.finish_reason for output in mine].count(None) == len(mine) - 1
        return [token for output in mine for token in unpack_int32(output.new_token_ids).tolist()]
