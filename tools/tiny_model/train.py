"""Makes the embedded checkpoint from nothing: `python -m tools.tiny_model.train --out FOLDER`.

Two stages, both on pictures drawn on the fly. First the vision tower alone learns, for every merged token, which shape,
colour and digit covers it (dense labels from the renderer: end to end, shape would stay at chance for a quarter of an hour).
Then tower and decoder learn together to answer, several questions a picture in one conversation. The result is a plain
Hugging Face folder with fp16 weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention, apply_rotary_pos_emb_vision

from tools.tiny_model import tokenizer as bpe
from tools.tiny_model.questions import ask, small_talk
from tools.tiny_model.scenes import NUM_DENSE_CLASSES, SIZES, Scene, dense_labels, draw, make_scene

IGNORED = -100
IMAGE_LIMITS = {"min_pixels": 112 * 112, "max_pixels": 140 * 140}


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    def token(text: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(text))  # type: ignore[arg-type]

    text = {
        "vocab_size": len(tokenizer), "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"), "pad_token_id": token("<|endoftext|>"), "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
    }  # fmt: skip
    vision = {"depth": 6, "embed_dim": 256, "num_heads": 4, "hidden_size": 256, "mlp_ratio": 4, "patch_size": 14, "spatial_merge_size": 2}
    return Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"), vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
    )  # fmt: skip


class Conversation(NamedTuple):
    token_ids: list[int]
    labels: list[int]  # IGNORED but for the answers


class Batch(NamedTuple):
    pixel_values: Tensor  # [num_patches, 1176] float32
    grid_thw: Tensor  # [num_images, 3] int64
    dense: Tensor  # [num_images, rows, columns, 3] int64
    input_ids: Tensor  # [num_images, length] int64; empty in the vision stage
    labels: Tensor  # like input_ids


def converse(scene: Scene, num_image_tokens: int, rng: random.Random, tokenizer: PreTrainedTokenizerFast, num_turns: int) -> Conversation:
    """Several questions about one picture as a chat; the picture stands in the first turn, before or after its text."""
    vision = "<|vision_start|>" + "<|image_pad|>" * num_image_tokens + "<|vision_end|>"
    token_ids: list[int] = []
    labels: list[int] = []

    def say(text: str, learn: bool) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        token_ids.extend(ids)
        labels.extend(ids if learn else [IGNORED] * len(ids))

    if rng.random() < 0.3:
        system = rng.choice(("You are a helpful assistant.", "Answer in a few words.", "You answer questions about pictures."))
        say(f"<|im_start|>system\n{system}<|im_end|>\n", False)
    for turn in range(num_turns):
        question = small_talk(rng) if rng.random() < 0.04 else ask(scene, rng)
        text = question.text
        if turn == 0:
            text = vision + text if rng.random() < 0.75 else text + vision
        say(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", False)
        say(f"{question.answer}<|im_end|>", True)
        say("\n", False)
    return Conversation(token_ids, labels)


class Batches(IterableDataset[Batch]):
    """Endless batches; all pictures of one batch have one size, so that the tower's attention is one batched call."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, batch_size: int, num_turns: int, seed: int) -> None:
        self.tokenizer, self.batch_size, self.num_turns, self.seed = tokenizer, batch_size, num_turns, seed

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        rng = random.Random(self.seed)
        processor = Qwen2VLImageProcessorPil(min_pixels=IMAGE_LIMITS["min_pixels"], max_pixels=IMAGE_LIMITS["max_pixels"])
        while True:
            size = rng.choices(SIZES, weights=(7, 1, 1, 1))[0]
            scenes = [make_scene(rng, crowded=not self.num_turns and rng.random() < 0.8) for _ in range(self.batch_size)]
            images = processor(images=[draw(scene, size) for scene in scenes], return_tensors="pt")
            dense = torch.from_numpy(np.stack([dense_labels(scene, size) for scene in scenes]))
            num_tokens = dense.shape[1] * dense.shape[2]
            talks = [converse(scene, num_tokens, rng, self.tokenizer, self.num_turns) for scene in scenes] if self.num_turns else []
            length = max((len(talk.token_ids) for talk in talks), default=0)
            input_ids = torch.zeros(self.batch_size, length, dtype=torch.int64)
            labels = torch.full_like(input_ids, IGNORED)
            for row, talk in enumerate(talks):
                input_ids[row, : len(talk.token_ids)] = torch.tensor(talk.token_ids)
                labels[row, : len(talk.labels)] = torch.tensor(talk.labels)
            yield Batch(images["pixel_values"], images["image_grid_thw"], dense, input_ids, labels)


class DenseHead(nn.Module):
    """Shape, colour and digit class of each merged token; thrown away after training."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, sum(NUM_DENSE_CLASSES))

    def forward(self, embeddings: Tensor, dense: Tensor) -> tuple[Tensor, list[float]]:
        """Loss, and the accuracy over tokens where something is, for shape, colour and digit."""
        logits = self.linear(embeddings.float()).split(NUM_DENSE_CLASSES, dim=-1)
        targets = dense.reshape(-1, 3).unbind(-1)
        loss = sum((F.cross_entropy(x, y) for x, y in zip(logits, targets, strict=True)), torch.zeros(()))
        seen = [((x.argmax(-1) == y)[y > 0]).float().mean().item() for x, y in zip(logits, targets, strict=True)]
        return loss, seen


def make_fast(model: Qwen2VLForConditionalGeneration) -> None:
    """Training-only shortcuts with equal results: patch embedding as a matmul, attention batched over equal pictures."""

    def embed_patches(patches: Tensor) -> Tensor:
        projection = model.model.visual.patch_embed.proj.weight
        return F.linear(patches.to(projection.dtype), projection.flatten(1))

    def attend(attention: VisionAttention) -> object:
        def forward(hidden: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: object) -> Tensor:
            count = len(cu_seqlens) - 1
            q, k, v = attention.qkv(hidden).reshape(len(hidden), 3, attention.num_heads, -1).unbind(1)
            q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
            q, k, v = (x.reshape(count, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(hidden), -1)
            return attention.proj(out)  # type: ignore[no-any-return]

        return forward

    model.model.visual.patch_embed.forward = embed_patches
    for block in model.model.visual.blocks:
        block.attn.forward = attend(block.attn)


def has_fast_bfloat16(device: torch.device) -> bool:
    """On a processor without bf16 instructions, bf16 matmuls fall to a path a hundred times slower than fp32."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def learning_rate(elapsed: float, budget: float, peak: float, step: int) -> float:
    warmup = min(1.0, (step + 1) / 40)
    return peak * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, elapsed / budget))))


def run_stage(
    name: str,
    model: Qwen2VLForConditionalGeneration,
    head: DenseHead,
    batches: Batches,
    minutes: float,
    folder: Path,
    peak: float,
    is_tower_frozen: bool = False,
) -> None:
    joint = batches.num_turns > 0
    tower = [] if is_tower_frozen else [*model.model.visual.parameters()]
    model.model.visual.requires_grad_(not is_tower_frozen)
    rest = [*model.model.language_model.parameters()] if joint else []
    groups = [{"params": [*tower, *head.parameters()], "peak": peak * (0.3 if joint else 0.7)}, {"params": rest, "peak": peak}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    device = next(model.parameters()).device
    start = time.monotonic()
    for step, batch in enumerate(DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4)):
        elapsed = time.monotonic() - start
        if elapsed > minutes * 60:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(elapsed, minutes * 60, group["peak"], step)
        batch = Batch(*(part.to(device) for part in batch))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_fast_bfloat16(device)):
            if joint:
                types = (batch.input_ids == model.config.image_token_id).int()
                embeddings = model.model.visual(batch.pixel_values, grid_thw=batch.grid_thw).pooler_output
                inputs = model.model.language_model.embed_tokens(batch.input_ids)
                inputs = inputs.masked_scatter(types.bool()[..., None], embeddings.to(inputs.dtype))
                positions, _ = model.model.get_rope_index(batch.input_ids, mm_token_type_ids=types, image_grid_thw=batch.grid_thw)
                hidden = model.model.language_model(inputs_embeds=inputs, position_ids=positions, use_cache=False).last_hidden_state
                learn = batch.labels[:, 1:] != IGNORED
                logits = model.lm_head(hidden[:, :-1][learn])
                targets = batch.labels[:, 1:][learn]
                answer_loss = F.cross_entropy(logits.float(), targets)
                token_accuracy = (logits.argmax(-1) == targets).float().mean().item()
            else:
                embeddings = model.model.visual(batch.pixel_values, grid_thw=batch.grid_thw).pooler_output
                answer_loss, token_accuracy = torch.zeros(()), 0.0
        dense_loss, seen = head(embeddings, batch.dense)
        loss = answer_loss + (0.0 if is_tower_frozen else 0.2 if joint else 1.0) * dense_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            rate = (step + 1) * batches.batch_size / max(elapsed, 1e-9)
            shape, color, digit = (f"{100 * value:.0f}" for value in seen)
            print(
                f"{name} {elapsed / 60:5.1f} min  step {step}  {rate:.0f} pictures/s  answer loss {answer_loss.item():.3f}  "
                f"answer tokens {100 * token_accuracy:.1f} %  dense: shape {shape} colour {color} digit {digit} %",
                flush=True,
            )
        if step % 100 == 99:
            torch.save({"model": model.state_dict(), "head": head.state_dict()}, folder / "training.pt")
    torch.save({"model": model.state_dict(), "head": head.state_dict()}, folder / "training.pt")


def export(model: Qwen2VLForConditionalGeneration, folder: Path) -> None:
    """Writes config, fp16 weights, generation and image-processor settings beside the tokenizer that is already there."""
    text = json.loads(model.config.to_json_string(use_diff=False))["text_config"]
    ids = {name: text[name] for name in ("bos_token_id", "pad_token_id")}
    model.generation_config.update(do_sample=False, eos_token_id=[text["eos_token_id"], text["bos_token_id"]], **ids)
    model.half().save_pretrained(folder)
    settings = {
        **IMAGE_LIMITS,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--vision-minutes", type=float, default=8.0, help="time for the vision tower alone")
    parser.add_argument("--joint-minutes", type=float, default=22.0, help="time for tower and decoder together")
    parser.add_argument("--decoder-minutes", type=float, default=0.0, help="time for the decoder alone: more questions a second")
    parser.add_argument("--resume", type=Path, help="checkpoint folder to start from, with the training.pt beside it if there is one")
    parser.add_argument("--peak", type=float, default=1.5e-3, help="highest learning rate; lower for a short run on a resumed checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.resume:  # with its own tokenizer: trained anew on other questions it would number its tokens anew
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.resume)
        tokenizer.save_pretrained(args.out)
        model = Qwen2VLForConditionalGeneration.from_pretrained(args.resume, dtype=torch.float32).train()
    else:
        tokenizer = bpe.train(args.out)
        model = Qwen2VLForConditionalGeneration(make_config(tokenizer)).train()
    nn.Module.to(model, device)
    head = DenseHead(model.config.text_config.hidden_size).to(device)
    if args.resume and (state_file := args.resume.parent / "training.pt").is_file():
        state = torch.load(state_file, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        head.load_state_dict(state["head"])
    make_fast(model)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters on {device}", flush=True)
    scratch = args.out.parent
    if args.vision_minutes:
        run_stage("vision", model, head, Batches(tokenizer, 64, 0, args.seed + 1), args.vision_minutes, scratch, args.peak)
    if args.decoder_minutes:
        run_stage("decoder", model, head, Batches(tokenizer, 24, 12, args.seed + 3), args.decoder_minutes, scratch, args.peak, is_tower_frozen=True)
    if args.joint_minutes:
        run_stage("joint", model, head, Batches(tokenizer, 32, 4, args.seed + 2), args.joint_minutes, scratch, args.peak)
    export(model, args.out)


if __name__ == "__main__":
    main()
