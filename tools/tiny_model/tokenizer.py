"""The embedded model's tokenizer: a byte-level BPE of 4096 entries with Qwen's special tokens and
pre-tokenisation rule.

It is trained on our own questions and answers and, so that plain English is not spelt out in letters, on the
documentation strings of Python's standard library.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tools.tiny_model import small_talk
from tools.tiny_model.lessons import KINDS, make_lesson
from tools.tiny_model.teacher import TRAINING, Teacher

VOCAB_SIZE = 4096
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Letters with an optional leading sign, single digits, punctuation runs, line breaks, blanks: the rule of
# GPT-4-like BPEs.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] in ('video', 'video_url') -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


ENGLISH_MODULES = (
    "argparse",
    "asyncio",
    "collections",
    "csv",
    "datetime",
    "decimal",
    "email",
    "functools",
    "inspect",
    "logging",
    "pathlib",
    "random",
    "re",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "textwrap",
    "threading",
    "typing",
    "unittest",
    "zipfile",
)


def corpus() -> Iterator[str]:
    rng = random.Random(0)
    teacher = Teacher(rng, TRAINING)
    kinds, weights = list(KINDS), [kind.weight for kind in KINDS.values()]
    for kind in rng.choices(kinds, weights, k=8_000):
        for turn in make_lesson(teacher, kind).turns:
            yield f"system\nuser\n{turn.text}\nassistant\n{turn.answer}"
    for _ in range(500):
        yield small_talk.unknown_question(rng, held_out=False)
    for name in ENGLISH_MODULES:
        module = importlib.import_module(name)
        for member in vars(module).values():
            if isinstance(text := getattr(member, "__doc__", None), str):
                yield text


def train(folder: Path) -> PreTrainedTokenizerFast:
    """Trains the tokenizer and saves it, with the chat template, as Hugging Face does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        # Each Chinese character alone: from so few sentences, merges would be whole phrases.
        [
            pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    size = VOCAB_SIZE - len(SPECIAL_TOKENS)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    return wrapped
