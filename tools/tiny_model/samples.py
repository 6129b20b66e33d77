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

import av
import numpy as np
from PIL import Image

from tools.tiny_model import assets
from tools.tiny_model.pictures import draw_chart, draw_emoji, draw_print
from tools.tiny_model.scenes import Scene, Thing, draw

GROUND = (176, 182, 190)
SIDE = 224
NUM_FRAMES, FPS = 16, 8
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


def film() -> list[Image.Image]:
    """A blue star goes from left to right."""
    return [
        draw(Scene((Thing("star", "blue", 0.2 + 0.04 * number, 0.5, 0.16),), GROUND, 2), (SIDE, SIDE))
        for number in range(NUM_FRAMES)
    ]


def write_film(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "30", "movflags": "faststart"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for frame in film():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame), format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, image in samples().items():
        image.save(args.out / f"{name}.png", optimize=True)
    write_film(args.out / "moving-star.mp4")


if __name__ == "__main__":
    main()
