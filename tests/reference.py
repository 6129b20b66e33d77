"""Hugging Face's own Qwen2-VL on the same checkpoint: what every number is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

TIE = 1e-3  # two best logits closer than this may swap


class Answer(NamedTuple):
    prompt_token_ids: list[int]
    token_ids: list[int]
    gaps: list[float]  # between the two best logits of each step


class Reference:
    """Chats are lists of (role, parts); a part is a string or a picture."""

    def __init__(self, folder: Path) -> None:
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)

    def inputs(self, chat: Sequence[tuple[str, Sequence[str | Image.Image]]]) -> dict[str, Any]:
        messages = [
            {"role": role, "content": [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]}
            for role, parts in chat
        ]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        images = [part for _, parts in chat for part in parts if not isinstance(part, str)]
        extra: dict[str, Any] = {}
        if images:
            processed = self.processor(images=images, return_tensors="pt")
            extra = {"pixel_values": processed["pixel_values"], "image_grid_thw": processed["image_grid_thw"]}
            for _, height, width in processed["image_grid_thw"].tolist():
                text = text.replace("<|image_pad|>", "<|placeholder|>" * (height * width // 4), 1)
            text = text.replace("<|placeholder|>", "<|image_pad|>")
        ids = torch.tensor([self.tokenizer.encode(text, add_special_tokens=False)])
        types = (ids == self.model.config.image_token_id).int()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, **extra}

    @torch.inference_mode()
    def answer(self, chat: Sequence[tuple[str, Sequence[str | Image.Image]]], num_tokens: int) -> Answer:
        inputs = self.inputs(chat)
        out = self.model.generate(**inputs, do_sample=False, max_new_tokens=num_tokens, output_scores=True, return_dict_in_generate=True)
        best = [scores[0].topk(2).values for scores in out.scores]
        prompt = inputs["input_ids"][0].tolist()
        return Answer(prompt, out.sequences[0, len(prompt) :].tolist(), [float(pair[0] - pair[1]) for pair in best])


def assert_same_tokens(ours: Sequence[int], reference: Answer, what: str = "") -> None:
    """Identical, or the first difference is where the reference's own two best logits are a tie."""
    for step, (mine, theirs) in enumerate(zip(ours, reference.token_ids, strict=True)):
        if mine != theirs:
            gap = reference.gaps[step]
            assert gap < TIE, f"{what}: token {step} is {mine}, Hugging Face has {theirs}, its two best logits are {gap:.4f} apart"
            return
