"""Draws the sample pictures that ship with the embedded model: `python -m tools.tiny_model.samples --out FOLDER`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.tiny_model.scenes import Scene, Thing, draw

GROUND = (176, 182, 190)
# Seeds that draw no grain: a small file can be pasted into a command line.
SAMPLES = {
    "red-circle": Scene((Thing("circle", "red", 0.5, 0.5, 0.28),), "", GROUND, "black", 2),
    "three-shapes": Scene(
        (
            Thing("square", "blue", 0.17, 0.17, 0.13),
            Thing("star", "yellow", 0.83, 0.5, 0.13),
            Thing("triangle", "red", 0.5, 0.83, 0.13),
        ),
        "",
        GROUND,
        "black",
        5,
    ),
    "number": Scene((), "42", GROUND, "blue", 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for name, scene in SAMPLES.items():
        draw(scene, (224, 224)).save(args.out / f"{name}.png")


if __name__ == "__main__":
    main()
