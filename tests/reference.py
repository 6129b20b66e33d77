"""Hugging Face's own Qwen2-VL on the same checkpoint: what every number is compared with."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import msgspec
import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.chats import ChatTurns, Clip, Piece
from workers.preprocess.video_files import open_video

TIE = 1e-3  # two best logits closer than this may swap


class Answer(NamedTuple):
    prompt_token_ids: list[int]
    token_ids: list[int]
    gaps: list[float]  # between the two best logits of each step


class Reference:
    """Chats are lists of (role, pieces) as in `tests/chats.py`."""

    def __init__(self, folder: Path) -> None:
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)

    def inputs(self, chat: ChatTurns) -> dict[str, Any]:
        def to_part(piece: Piece) -> dict[str, str]:
            if isinstance(piece, str):
                return {"type": "text", "text": piece}
            return {"type": "image" if isinstance(piece, Image.Image) else "video"}

        messages = [{"role": role, "content": [to_part(piece) for piece in pieces]} for role, pieces in chat]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        pieces = [piece for _, pieces in chat for piece in pieces]
        images = [piece for piece in pieces if isinstance(piece, Image.Image)]
        extra: dict[str, Any] = {}
        if images:
            processed = self.processor(images=images, return_tensors="pt")
            extra = {"pixel_values": processed["pixel_values"], "image_grid_thw": processed["image_grid_thw"]}
            for _, height, width in processed["image_grid_thw"].tolist():
                text = text.replace("<|image_pad|>", "<|placeholder|>" * (height * width // 4), 1)
            text = text.replace("<|placeholder|>", "<|image_pad|>")
        if videos := [self._video(piece) for piece in pieces if isinstance(piece, Clip | tuple)]:
            extra |= {
                "pixel_values_videos": torch.cat([patches for patches, _ in videos]),
                "video_grid_thw": torch.tensor([grid for _, grid in videos]),
            }
            for _, (length, height, width) in videos:
                text = text.replace("<|video_pad|>", "<|placeholder|>" * (length * height * width // 4), 1)
            text = text.replace("<|placeholder|>", "<|video_pad|>")
        ids = torch.tensor([self.tokenizer.encode(text, add_special_tokens=False)])
        types = (ids == self.model.config.image_token_id).int() + 2 * (
            ids == self.model.config.video_token_id
        ).int()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **extra}

    def _video(self, piece: Clip | tuple[Image.Image, ...]) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Patches and grid of a video, its frames chosen, resized and cut as by Hugging Face's processor."""
        if isinstance(piece, Clip):
            with tempfile.NamedTemporaryFile() as file:
                Path(file.name).write_bytes(piece.data)
                video = open_video(file.name, "pyav", 10**7)
                total, rate, _, _ = msgspec.structs.astuple(video.metadata)
                frames = np.stack(list(video.frames(sample_frames(total, rate, piece.fps, 768))))
        else:
            frames = np.stack([np.asarray(frame) for frame in piece])
        module = video_processing()
        limits = {
            "min_pixels": self.processor.size["shortest_edge"],
            "max_pixels": min(self.processor.size["longest_edge"], 768 * 28 * 28),
        }
        size = module.smart_resize(*frames.shape[1:3], factor=28, **limits)
        # What torchvision's resize calls for tensors of bytes.
        resized = torch.nn.functional.interpolate(
            torch.from_numpy(frames).permute(0, 3, 1, 2), size, mode="bicubic", antialias=True
        )
        mean, std = (
            torch.tensor(values).view(3, 1, 1)
            for values in (self.processor.image_mean, self.processor.image_std)
        )
        patches, *grid = module.Qwen2VLVideoProcessor.patchify(
            None, ((resized.float() / 255 - mean) / std)[None], 14, 2, 2
        )
        return patches[0], tuple(grid)

    @torch.inference_mode()
    def answer(self, chat: ChatTurns, num_tokens: int) -> Answer:
        inputs = self.inputs(chat)
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
            prompt, out.sequences[0, len(prompt) :].tolist(), [float(pair[0] - pair[1]) for pair in best]
        )


def video_processing(family: str = "qwen2_vl") -> Any:
    """The module of Hugging Face's video processor.

    It wants torchvision, of which there is no build for every torch; of that nothing is used.
    """
    modules = {
        name: ModuleType(name)
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")
    }
    modules["torchvision.transforms.v2.functional"] = mock.MagicMock()
    with mock.patch.dict(sys.modules, modules):
        return importlib.import_module(f"transformers.models.{family}.video_processing_{family}")


def sample_frames(total: int, rate: float, fps: float, max_frames: int) -> list[int]:
    """Hugging Face's choice of frames."""
    of = SimpleNamespace(num_frames=None)
    metadata = SimpleNamespace(total_num_frames=total, fps=rate)
    found = video_processing().Qwen2VLVideoProcessor.sample_frames(
        of, metadata, temporal_patch_size=2, min_frames=4, max_frames=max_frames, fps=fps
    )
    return [min(index, total - 1) for index in found.tolist()]


def assert_same_tokens(ours: Sequence[int], reference: Answer, what: str = "") -> None:
    """Identical, or the first difference is where the reference's own two best logits are a tie."""
    for step, (mine, theirs) in enumerate(zip(ours, reference.token_ids, strict=True)):
        if mine != theirs:
            gap = reference.gaps[step]
            assert gap < TIE, (
                f"{what}: token {step} is {mine}, Hugging Face has {theirs}, its two best logits are "
                f"{gap:.4f} apart"
            )
            return
