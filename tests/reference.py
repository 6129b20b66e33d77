"""Hugging Face's own model of a family on the same checkpoint: what every number is compared with."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from tests.chats import ChatTurns, Piece
from tests.positions import PICTURE, TEXT, VIDEO, rope_index
from tests.video_reference import SeenVideo, VideoReference, sample_frames, video_processing

__all__ = ["Answer", "Reference", "assert_same_tokens", "sample_frames", "video_processing"]

TIE = 1e-3  # two best logits closer than this may swap
# Of a router's logits, between the last expert that is chosen and the first one that is not.
ROUTER_TIE = 2e-4
PICTURE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"


class Answer(NamedTuple):
    prompt_token_ids: list[int]
    token_ids: list[int]
    gaps: list[float]  # between the two best logits of each step
    router_gap: float  # the least, of all tokens and layers; inf: there are no experts


class Reference:
    """Chats are lists of (role, pieces) as in `tests/chats.py`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.family: str = json.loads((folder / "config.json").read_text())["model_type"]
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.videos = VideoReference(folder, self.family, self.processor)

    def inputs(self, chat: ChatTurns) -> dict[str, Any]:
        """What Hugging Face's processor makes of a chat for `generate`."""
        text = self._render(chat)
        pieces = [piece for _, pieces in chat for piece in pieces if not isinstance(piece, str)]
        extra: dict[str, Any] = {}
        if images := [piece for piece in pieces if isinstance(piece, Image.Image)]:
            processed = self.processor(images=images, return_tensors="pt")
            extra = {"pixel_values": processed["pixel_values"], "image_grid_thw": processed["image_grid_thw"]}
            counts = (processed["image_grid_thw"].prod(1) // self.processor.merge_size**2).tolist()
            text = _filled(text, PICTURE_PAD, [PICTURE_PAD * count for count in counts])
        if videos := [self.videos.see(piece) for piece in pieces if not isinstance(piece, Image.Image)]:
            extra["pixel_values_videos"] = torch.cat([video.patches for video in videos])
            extra["video_grid_thw"] = torch.tensor([video.grid for video in videos])
            if self.family == "qwen2_5_vl":
                extra["second_per_grid_ts"] = torch.tensor(
                    [self.processor.temporal_patch_size / video.sampled_fps for video in videos]
                )
            text = _filled(text, VIDEO_PAD, self._expansions(videos))
        ids = torch.tensor([self.tokenizer.encode(text, add_special_tokens=False)])
        types = torch.full_like(ids, TEXT)
        types[ids == self.model.config.image_token_id] = PICTURE
        types[ids == self.model.config.video_token_id] = VIDEO
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **extra}

    def _render(self, chat: ChatTurns) -> str:
        def to_part(piece: Piece) -> dict[str, str]:
            if isinstance(piece, str):
                return {"type": "text", "text": piece}
            return {"type": "image" if isinstance(piece, Image.Image) else "video"}

        messages = [{"role": role, "content": [to_part(piece) for piece in pieces]} for role, pieces in chat]
        rendered: str = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return rendered

    def _expansions(self, videos: Sequence[SeenVideo]) -> list[str]:
        """What takes the place of each video's one token."""
        if not self.family.startswith("qwen3"):
            merged = self.processor.merge_size**2
            return [VIDEO_PAD * (torch.tensor(video.grid).prod() // merged) for video in videos]
        of = SimpleNamespace(
            video_processor=self.videos.processor,
            video_token=VIDEO_PAD,
            vision_start_token="<|vision_start|>",
            vision_end_token="<|vision_end|>",
            _calculate_timestamps=functools.partial(Qwen3VLProcessor._calculate_timestamps, None),
        )
        inputs = {
            "video_grid_thw": torch.tensor([video.grid for video in videos]),
            "video_metadata": [video.metadata for video in videos],
        }
        return [Qwen3VLProcessor.replace_video_token(of, inputs, index) for index in range(len(videos))]

    def positions(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Rows [3, 1, tokens], and what a later token adds to its index [1, 1].

        transformers' own, except where they are wrong: see `tests/positions.py`.
        """
        names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw")
        media = {name: inputs[name] for name in names if name in inputs}
        if self.family.startswith("qwen3") or "video_grid_thw" not in inputs:
            rows, deltas = self.model.model.get_rope_index(inputs["input_ids"], **media)
            return rows, deltas
        grids = inputs["video_grid_thw"].tolist()
        steps = [1.0] * len(grids)
        if "second_per_grid_ts" in inputs:
            rate = self.model.config.vision_config.tokens_per_second
            steps = (rate * inputs["second_per_grid_ts"]).tolist()
        pictures = inputs["image_grid_thw"].tolist() if "image_grid_thw" in inputs else []
        rows, delta = rope_index(
            inputs["mm_token_type_ids"][0].tolist(), pictures, grids, self.processor.merge_size, steps
        )
        return rows[:, None], torch.tensor([[delta]])

    @torch.inference_mode()
    def answer(self, chat: ChatTurns, num_tokens: int) -> Answer:
        inputs = self.inputs(chat)
        positions = self.positions(inputs)
        with (
            mock.patch.object(self.model.model, "get_rope_index", return_value=positions),
            _router_gaps(self.model) as router_gaps,
        ):
            out = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=num_tokens,
                output_scores=True,
                return_dict_in_generate=True,
            )
        best = [scores[0].topk(2).values for scores in out.scores]
        prompt = inputs["input_ids"][0].tolist()
        return Answer(
            prompt,
            out.sequences[0, len(prompt) :].tolist(),
            [float(pair[0] - pair[1]) for pair in best],
            min(router_gaps, default=math.inf),
        )


@contextlib.contextmanager
def _router_gaps(model: Any) -> Iterator[list[float]]:
    """For each call of a router the least distance between an expert that it takes and one that it leaves."""
    gaps: list[float] = []
    count = getattr(model.config.text_config, "num_experts_per_tok", 0)

    def note(router: Any, inputs: tuple[Tensor, ...], _: object) -> None:
        scores = F.linear(inputs[0].flatten(0, -2), router.weight).topk(count + 1).values
        gaps.append(float((scores[:, -2] - scores[:, -1]).min()))

    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    handles = [router.register_forward_hook(note) for router in routers]
    try:
        yield gaps
    finally:
        for handle in handles:
            handle.remove()


def _filled(text: str, pad: str, expansions: Sequence[str]) -> str:
    """The i-th pad replaced by the i-th expansion, which may contain pads."""
    before, *rest = text.split(pad)
    for expansion, behind in zip(expansions, rest, strict=True):
        before += expansion + behind
    return before


def assert_same_tokens(ours: Sequence[int], reference: Answer, what: str = "") -> None:
    """Identical, or the first difference is where the reference's own two best logits are a tie. Where one of
    its routers had a tie nothing is compared: the reference differs from itself, with other threads."""
    if reference.router_gap < ROUTER_TIE:
        return
    for step, (mine, theirs) in enumerate(zip(ours, reference.token_ids, strict=True)):
        if mine != theirs:
            gap = reference.gaps[step]
            assert gap < TIE, (
                f"{what}: token {step} is {mine}, Hugging Face has {theirs}, its two best logits are "
                f"{gap:.4f} apart"
            )
            return
