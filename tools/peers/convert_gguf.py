"""Makes GGUF files of a checkpoint by llama.cpp's own converter.

    PYTHON convert_gguf.py SOURCE/convert_hf_to_gguf.py --outtype bf16 --outfile OUT.gguf MODEL [--mmproj]

PYTHON has torch and transformers. The converter knows a tokenizer by a hash of what it makes of a sample, and
refuses one that it has not seen: the tokenizer of a random checkpoint splits as Qwen2's does, and is taken as
such. All else is the converter's.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path


def main() -> None:
    script = Path(sys.argv[1]).resolve()
    sys.path[0] = str(script.parent)
    sys.path.insert(1, str(script.parent / "gguf-py"))
    text_model = importlib.import_module("conversion.base").TextModel
    text_model.get_vocab_base_pre = lambda *_: "qwen2"
    sys.argv = [str(script), *sys.argv[2:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
