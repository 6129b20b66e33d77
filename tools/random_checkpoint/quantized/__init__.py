"""Quantises a dense checkpoint into the files of each maker: names, layouts, settings and exceptions are
theirs, the numbers are the nearest ones, without calibration.

    quantize_checkpoint(dense folder, new folder, "awq")

`layers.py` says which layers makers quantise, `awq.py`, `gptq.py`, `scaled.py` and `compressed.py` what
becomes of one, `unserved.py` makes files that are to be refused, `write.py` walks over the tensors.
"""

from tools.random_checkpoint.quantized.recipes import RECIPES
from tools.random_checkpoint.quantized.write import quantize_checkpoint

__all__ = ["RECIPES", "quantize_checkpoint"]
