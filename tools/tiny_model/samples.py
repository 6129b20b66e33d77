"""Draws the sample pictures that ship with the embedded model: `python -m tools.tiny_model.samples --out
FOLDER`.

They show what no training picture does: colour-shape pairs, places, typefaces and renderings that are held
out; but for the blank one and the chart, in which there is nothing to hold out. The emoji, the word and the
number need the packages of `assets.py`: they are left out without.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from PIL import Image

from tools.tiny_model import assets
from tools.tiny_model.pictures import draw_chart, draw_emoji, draw_print
from tools.tiny_model.scenes import Scene, Thing, draw

GROUND = (176, 182, 190)
SIDE = 224
SCENES = {
    "red-star": Scene((Thing("star", "red", 0.5, 0.5, 0.28),), GROUND, 2),
    "three-shapes": Scene(
        (
            Thing("cross", "blue", 0.5, 0.17, 0.13),
            Thing("ring", "yellow", 0.17, 0.5, 0.13),
            Thing("heart", "red", 0.83, 0.5, 0.13),
        ),
        GROUND,
        2,
    ),
    "blank": Scene((), GROUND, 2),
}


def samples() -> dict[str, Image.Image]:
    """By name. The seeds are of pictures without grain, which compress well."""
    size = (SIDE, SIDE)
    found = {name: draw(scene, size) for name, scene in SCENES.items()}
    if len(assets.fonts(held_out=True)) == len(assets.HELD_OUT_FONTS):
        found["number"] = draw_print(random.Random(6), size, "427", held_out=True)[0].frames[0]
        found["word"] = draw_print(random.Random(5), size, "open", held_out=True)[0].frames[0]
    found["chart"] = draw_chart(random.Random(2), size)[0].frames[0]
    if drawn := draw_emoji(random.Random(9), size, held_out=True):
        found["emoji"] = drawn[0].frames[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, image in samples().items():
        image.save(args.out / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
