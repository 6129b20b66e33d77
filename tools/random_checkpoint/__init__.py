"""Checkpoints with random weights, laid out as the published ones: how fast they run does not depend on the
values.

    python -m tools.random_checkpoint qwen3-vl-4b FOLDER --layers 8
    python -m tools.random_checkpoint qwen3-vl-4b FOLDER --quantized awq

A shape (`shapes.py`) is a published model's or a small one of its family. `settings.py` writes the JSON
files, `tokenizer.py` a tokenizer in which every id is a word, `weights.py` the tensors under the hub's names,
`lora.py` adapters, and `quantized/` makes the files of quantised models of them.
"""

from tools.random_checkpoint.make import make_checkpoint
from tools.random_checkpoint.shapes import SHAPES

__all__ = ["SHAPES", "make_checkpoint"]
