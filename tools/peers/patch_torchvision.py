"""Makes the torchvision of the package index, a build for CUDA, usable beside a torch without CUDA.

    PYTHON patch_torchvision.py

Its compiled operators do not load there, and the import fails at the first that is not declared; pictures
cannot be decoded. The peers need neither: the operators are declared, and Pillow decodes. Run once, by the
Python of each peer that has torch.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

MARK = "# patched for a torch without CUDA"
OPERATORS = f"""

{MARK}
if not _has_ops():
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
DECODING = f"""

{MARK}
def decode_image(input, mode=ImageReadMode.UNCHANGED, apply_exif_orientation=False):
    import io
    import numpy
    from PIL import Image
    if isinstance(input, torch.Tensor):
        input = io.BytesIO(input.numpy().tobytes())
    pixels = numpy.array(Image.open(input).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)
"""


def append(path: Path, text: str) -> None:
    source = path.read_text()
    if MARK not in source:
        path.write_text(source + text)


def main() -> None:
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        sys.exit("this Python has no torchvision")
    folder = Path(found.origin).parent
    append(folder / "extension.py", OPERATORS)
    append(folder / "io" / "image.py", DECODING)


if __name__ == "__main__":
    main()
