"""Accuracy of a checkpoint on held-out scenes, per skill: `python -m tools.tiny_model.evaluate --model FOLDER`.

An answer counts when the greedy answer is right to the letter. Two sets: scenes of seeds never trained on, and scenes with
colour-shape pairs that no training picture shows. Runs in transformers; the pipeline gives the same tokens.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tools.tiny_model.questions import Question, ask
from tools.tiny_model.scenes import HELD_OUT_PAIRS, SIZES, Scene, draw, make_scene

HELD_OUT_SEED = 1_000_003


def held_out_questions(count: int, held_out_pairs: bool) -> list[tuple[Scene, Question]]:
    """`count` scenes with a question each; with `held_out_pairs` the question is about a thing of a pair never trained on."""
    rng = random.Random(HELD_OUT_SEED + held_out_pairs)
    pairs: list[tuple[Scene, Question]] = []
    while len(pairs) < count:
        scene = make_scene(rng, held_out=held_out_pairs)
        question = ask(scene, rng)
        thing = scene.things[0] if scene.things else None
        if held_out_pairs and thing is not None:
            assert (thing.color, thing.shape) in HELD_OUT_PAIRS
            about_shape = question.skill == "shape" and question.answer.rstrip(".").endswith(thing.shape)
            about_color = question.skill == "colour" and question.answer.lower().startswith(thing.color)
            if not (about_shape or about_color):
                continue
        pairs.append((scene, question))
    return pairs


class Judge:
    def __init__(self, folder: Path) -> None:
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.end = self.tokenizer.encode("<|im_end|>")

    @torch.inference_mode()
    def is_right(self, scene: Scene, question: Question) -> bool:
        """Whether greedy decoding gives the answer: every one of its tokens is the best one after those before it."""
        image = self.processor(images=[draw(scene, SIZES[0])], return_tensors="pt")
        count = int(image["image_grid_thw"].prod()) // 4
        vision = "<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>"
        prompt = self.tokenizer.encode(f"<|im_start|>user\n{vision}{question.text}<|im_end|>\n<|im_start|>assistant\n")
        answer = self.tokenizer.encode(question.answer) + self.end
        ids = torch.tensor([prompt + answer])
        types = (ids == self.model.config.image_token_id).int()
        logits = self.model(
            input_ids=ids, pixel_values=image["pixel_values"], image_grid_thw=image["image_grid_thw"], mm_token_type_ids=types
        ).logits[0]
        return bool((logits[len(prompt) - 1 : -1].argmax(-1) == ids[0, len(prompt) :]).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1500, help="questions of each set")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    args = parser.parse_args()
    judge = Judge(args.model)
    table: dict[str, dict[str, tuple[int, int]]] = {}
    for name, held_out_pairs in (("new scenes", False), ("pairs never trained on", True)):
        right: dict[str, list[bool]] = defaultdict(list)
        for scene, question in held_out_questions(args.count if not held_out_pairs else args.count // 3, held_out_pairs):
            right[question.skill].append(judge.is_right(scene, question))
        table[name] = {skill: (sum(results), len(results)) for skill, results in sorted(right.items())}
        print(f"\n| {name} | right | of | accuracy |\n| --- | --- | --- | --- |")
        for skill, (good, total) in table[name].items():
            print(f"| {skill} | {good} | {total} | {good / total:.1%} |")
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
