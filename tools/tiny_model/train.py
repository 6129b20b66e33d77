"""Makes the embedded checkpoint from nothing: `python -m tools.tiny_model.train --out FOLDER`.

Two stages, both on pictures drawn on the fly. First the vision tower alone learns, for every merged token,
what covers it (dense labels from the renderer: end to end, shape would stay at chance for a long time). Then
tower and decoder together learn to answer whole conversations; as long as the tower learns there, it sees
pictures of the first stage, too. The result, FOLDER/model, is a plain Hugging Face checkpoint with fp16
weights. A run that was stopped goes on where it was when the same command is given again: states, log and
plot of the losses lie in FOLDER. Needs transformers (`pip install
-e '.[test]'`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tools.tiny_model import assets, progress
from tools.tiny_model import tokenizer as bpe
from tools.tiny_model.batches import Batch, LessonBatches
from tools.tiny_model.frames import FrameBatches, Frames
from tools.tiny_model.labels import IGNORED
from tools.tiny_model.tower import MEAN, STD, DenseHead, embed, make_fast

IMAGE_LIMITS = {"min_pixels": 112 * 112, "max_pixels": 140 * 140}
SAVE_EVERY_S = 120.0
FRAMES_BESIDE = 16  # pictures of the first stage in each step of the second in which the tower learns
# in which a tower that knows something already only looks: the gradient of a new head would undo what it
# knows
HEAD_STEPS = 200


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    def token(text: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(text))  # type: ignore[arg-type]

    text = {
        "vocab_size": len(tokenizer), "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6,
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"), "pad_token_id": token("<|endoftext|>"),
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
    }  # fmt: skip
    vision = {
        "depth": 6,
        "embed_dim": 256,
        "num_heads": 4,
        "hidden_size": 256,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
    }
    return Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"), vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )  # fmt: skip


def has_fast_bfloat16(device: torch.device) -> bool:
    """On a processor without bf16 instructions, bf16 matmuls fall to a path a hundred times slower than
    fp32."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


class Trainer:
    """Weights and optimizers of one stage, and the state file that the stage goes on from.

    Matrices of the layers learn by Muon (Jordan 2024, as torch has it), everything else by AdamW: on the
    tower, Muon needed about a third fewer steps. The merger's two do not: they are so large that Muon took
    half of its time for them.
    """

    def __init__(
        self,
        stage: str,
        folder: Path,
        modules: dict[str, nn.Module],
        peaks: dict[str, float],
        num_steps: int,
        **settings: float | str,
    ) -> None:
        """`settings` are whatever else must be the same when the stage goes on."""
        self._modules, self.num_steps, self._path = modules, num_steps, folder / f"{stage}.pt"
        self._settings: dict[str, float | str] = {**peaks, "steps": num_steps, **settings}
        self._parameters = [parameter for module in modules.values() for parameter in module.parameters()]
        matrices, others = [], []
        for name, module in modules.items():
            mine = {key: value for key, value in module.named_parameters() if is_layer_matrix(key, value)}
            matrices.append({"params": list(mine.values()), "peak": peaks[name]})
            others.append(
                {
                    "params": [value for key, value in module.named_parameters() if key not in mine],
                    "peak": peaks[name] / 2,
                }
            )
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                [group for group in matrices if group["params"]],
                weight_decay=0.05,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.05, fused=True),
        ]
        self.step, self.position = 0, 0
        self.log = progress.Log(folder / "log.jsonl", stage)
        self._saved_at = time.monotonic()

    def resume(self, device: torch.device) -> bool:
        """Raises ValueError when what is there was begun with other settings: schedule and data would
        jump."""
        if (state := progress.load(self._path, device)) is None:
            return False
        if state["settings"] != self._settings:
            raise ValueError(
                f"{self._path} was begun with {state['settings']}, not {self._settings}: another --out "
                "begins anew"
            )
        for name, module in self._modules.items():
            module.load_state_dict(state[name])
        for optimizer, its_state in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        self.step, self.position = state["step"], state["position"]
        return True

    def learn(self, loss: Tensor, position: int) -> None:
        """One step down the gradient. `position` is that of the data, to go on from."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = progress.learning_rate(self.step, self.num_steps, group["peak"])
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        self.step, self.position = self.step + 1, position
        if time.monotonic() - self._saved_at > SAVE_EVERY_S or self.is_done:
            self.save()

    @property
    def is_done(self) -> bool:
        return self.step >= self.num_steps

    def save(self) -> None:
        state: dict[str, Any] = {name: module.state_dict() for name, module in self._modules.items()}
        optimizers = [optimizer.state_dict() for optimizer in self._optimizers]
        progress.save(
            self._path,
            {
                **state,
                "optimizers": optimizers,
                "step": self.step,
                "position": self.position,
                "settings": self._settings,
            },
        )
        self._saved_at = time.monotonic()


def is_layer_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and "embed" not in name and "merger" not in name and name != "linear.weight"


def batches_of(dataset: Iterable[Any], device: torch.device, max_workers: int | None = None) -> Iterator[Any]:
    """For a GPU they are drawn by processes beside this one, from the first that is asked for. On a CPU such
    a process would take a core from threads that wait for each other: a step then lasts nearly twice as long,
    while drawing its pictures takes a fifth of it.
    """
    if device.type != "cpu":
        free = max(1, (os.cpu_count() or 2) - 2)
        dataset = DataLoader(dataset, batch_size=None, num_workers=min(max_workers or free, free))  # type: ignore[arg-type]
    yield from dataset


def compile_blocks(blocks: Iterable[nn.Module], dynamic: bool) -> None:
    """Where batches have one of a few shapes, kernels made for these save a quarter of a step over those for
    any shape.

    Forgets what was compiled before: the tower's blocks are compiled for either stage, and dynamo would go on
    with the kernels that it has.
    """
    torch.compiler.reset()
    for block in blocks:
        block.compile(dynamic=dynamic)


def train_tower(tower: nn.Module, head: DenseHead, args: argparse.Namespace, device: torch.device) -> None:
    peaks = {"tower": args.vision_peak, "head": args.vision_peak}
    trainer = Trainer(
        "vision",
        args.out,
        {"tower": tower, "head": head},
        peaks,
        args.vision_steps,
        seed=args.seed,
        start=str(args.start_from),
    )
    trainer.resume(device)
    trainer.log.go_on(trainer.step)
    compile_blocks(tower.blocks, dynamic=False)  # type: ignore[arg-type]
    started, first = time.monotonic(), trainer.step
    for frames in (
        () if trainer.is_done else batches_of(FrameBatches(64, args.seed + 1, trainer.step), device)
    ):
        frames = frames.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_fast_bfloat16(device)):
            with torch.set_grad_enabled(args.start_from is None or trainer.step >= HEAD_STEPS):
                embeddings = embed(tower, frames.pixels)
            loss, seen = head(embeddings, frames.classes, frames.mass)
        trainer.learn(loss, trainer.step)
        if trainer.step % 25 == 0:
            rate = (trainer.step - first) * len(frames.pixels) / (time.monotonic() - started)
            trainer.log.write(trainer.step, trainer.num_steps, pictures_per_s=rate, loss=loss.item(), **seen)
        if trainer.is_done:
            break


class Learner:
    """Loss of a batch of lessons, and of pictures of the first stage while the tower learns.

    Lessons show only what has a name. From them alone the tower would learn the pairs of colour and shape by
    heart; shapes in colours without a name or in two, and blobs in one with a name, keep it from that.
    """

    def __init__(self, model: Qwen2VLForConditionalGeneration, head: DenseHead) -> None:
        self._model, self._head = model, head

    def loss(self, batch: Batch, beside: Frames | None) -> tuple[Tensor, dict[str, float]]:
        """`beside`: pictures of the first stage; None while the tower only looks."""
        model, config = self._model.model, self._model.config
        types = (batch.token_ids == config.image_token_id).long() + 2 * (
            batch.token_ids == config.video_token_id
        ).long()
        inputs = model.language_model.embed_tokens(batch.token_ids)
        dense_loss, seen = torch.zeros((), device=inputs.device), {}
        if len(batch.pixels):
            with torch.set_grad_enabled(beside is not None):
                embeddings = embed(model.visual, batch.pixels)
                dense_loss, seen = self._head(embeddings, batch.classes, batch.mass)
            inputs = inputs.masked_scatter((types > 0)[..., None], embeddings.to(inputs.dtype))
        positions, _ = model.get_rope_index(
            batch.token_ids,
            mm_token_type_ids=types.int(),
            image_grid_thw=batch.image_grids if len(batch.image_grids) else None,
            video_grid_thw=batch.video_grids if len(batch.video_grids) else None,
        )
        hidden = model.language_model(
            inputs_embeds=inputs, position_ids=positions, use_cache=False
        ).last_hidden_state
        learned = batch.targets[:, 1:] != IGNORED
        logits = self._model.lm_head(hidden[:, :-1][learned]).float()
        targets = batch.targets[:, 1:][learned]
        answer_loss = F.cross_entropy(logits, targets)
        accuracy = (logits.argmax(-1) == targets).float().mean().item()
        values = {
            "loss": answer_loss.item(),
            "answer_tokens": accuracy,
            "dense_loss": float(dense_loss.detach()),
            **seen,
        }
        if beside is not None:
            beside_loss, _ = self._head(embed(model.visual, beside.pixels), beside.classes, beside.mass)
            dense_loss = dense_loss + beside_loss
            values["beside_loss"] = beside_loss.item()
        return answer_loss + 0.1 * dense_loss, values


def train_all(
    model: Qwen2VLForConditionalGeneration,
    head: DenseHead,
    tokenizer: PreTrainedTokenizerFast,
    args: argparse.Namespace,
) -> None:
    device = next(model.parameters()).device
    modules: dict[str, nn.Module] = {
        "tower": model.model.visual,
        "decoder": model.model.language_model,
        "head": head,
    }
    peaks = {"tower": args.peak / 4, "decoder": args.peak, "head": args.peak / 4}
    trainer = Trainer(
        "joint", args.out, modules, peaks, args.joint_steps,
        seed=args.seed, start=str(args.start_from), frozen_share=args.frozen_share,
        max_tokens=args.max_tokens, beside=FRAMES_BESIDE,
    )  # fmt: skip
    if not trainer.resume(device) and args.export_only:
        raise ValueError(f"{args.out} has no state of the second stage to export")
    if not args.export_only:  # or the log of a run that is under way would lose what came after its state
        trainer.log.go_on(trainer.step)
    learner = Learner(model, head)
    compile_blocks((*model.model.visual.blocks, *model.model.language_model.layers), dynamic=True)
    started, num_lessons = time.monotonic(), 0
    sums: dict[str, list[float]] = defaultdict(list)
    dataset = LessonBatches(tokenizer, args.max_tokens, args.seed + 2, trainer.position)
    frozen_steps = math.ceil(trainer.num_steps * args.frozen_share)
    frames = batches_of(
        FrameBatches(FRAMES_BESIDE, args.seed + 3, max(trainer.step, frozen_steps)), device, max_workers=2
    )
    for pool, batch in () if trainer.is_done or args.export_only else batches_of(dataset, device):
        batch = batch.to(device)
        beside = None if trainer.step < frozen_steps else next(frames).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_fast_bfloat16(device)):
            loss, values = learner.loss(batch, beside)
        trainer.learn(loss, pool)
        num_lessons += len(batch.token_ids)
        for name, value in values.items():
            if value == value:  # some heads had nothing to see
                sums[name].append(value)
        if trainer.step % 25 == 0:
            rate = num_lessons / (time.monotonic() - started)
            trainer.log.write(
                trainer.step,
                trainer.num_steps,
                lessons_per_s=rate,
                **{name: sum(v) / len(v) for name, v in sums.items()},
            )
            sums.clear()
        if trainer.is_done:
            break


def export(model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the checkpoint: config, fp16 weights, generation and image-processor settings, tokenizer and
    chat template."""
    # how it was loaded here, which transformers 5.24 would write down with it
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(folder)
    text = json.loads(model.config.to_json_string(use_diff=False))["text_config"]
    ids = {name: text[name] for name in ("bos_token_id", "pad_token_id")}
    model.generation_config.update(
        do_sample=False, eos_token_id=[text["eos_token_id"], text["bos_token_id"]], **ids
    )
    for name in ("text_config", "vision_config"):
        getattr(model.config, name).dtype = torch.float16
    model.half().save_pretrained(folder)
    settings = {
        **IMAGE_LIMITS,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for states, log, plot and the checkpoint"
    )
    parser.add_argument(
        "--vision-steps", type=int, default=3000, help="steps of 64 pictures for the vision tower alone"
    )
    parser.add_argument("--joint-steps", type=int, default=12000, help="steps for tower and decoder together")
    parser.add_argument(
        "--frozen-share",
        type=float,
        default=0.6,
        help="of those steps in which the tower only looks: they are faster",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=5600, help="tokens of a step of both together, padding included"
    )
    parser.add_argument(
        "--vision-peak", type=float, default=2e-3, help="highest learning rate of the first stage"
    )
    parser.add_argument(
        "--peak",
        type=float,
        default=2e-3,
        help="highest learning rate of the decoder in the second; the tower's is a quarter",
    )
    parser.add_argument(
        "--start-from",
        type=Path,
        help=f"begin with this checkpoint; the first {HEAD_STEPS} steps fit a head to it",
    )
    parser.add_argument(
        "--export-only",
        action="store_true",
        help="train no further: write the checkpoint of the state as it is",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.start_from and args.vision_steps < HEAD_STEPS:
        parser.error(
            f"--start-from needs --vision-steps {HEAD_STEPS} or more: the head is new, and hardly learns in "
            "the second stage"
        )
    if lacking := assets.missing():
        parser.error(
            f"not here: {', '.join(lacking)}; python -m tools.tiny_model.assets fetches most of it, pip "
            "install -e '.[test]' the photos"
        )
    return args


def main() -> None:
    args = parse_arguments()
    folder = args.out / "model"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = args.start_from or folder
    tokenizer = (
        PreTrainedTokenizerFast.from_pretrained(source)
        if (source / "tokenizer.json").is_file()
        else bpe.train(folder)
    )
    if args.start_from:
        model = Qwen2VLForConditionalGeneration.from_pretrained(
            source, dtype=torch.float32, attn_implementation="eager"
        ).train()
    else:
        config = make_config(tokenizer)
        config._attn_implementation = "eager"
        model = Qwen2VLForConditionalGeneration(config).train()
    nn.Module.to(model, device)
    head = DenseHead(model.config.text_config.hidden_size).to(device)
    tower = model.model.visual
    make_fast(tower)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters on {device}", flush=True)
    if not args.export_only:
        train_tower(tower, head, args, device)
    train_all(model, head, tokenizer, args)
    export(model, tokenizer, folder)
    if (log := args.out / "log.jsonl").is_file():
        progress.plot(log, args.out / "loss.png")


if __name__ == "__main__":
    main()
