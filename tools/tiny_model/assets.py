"""Fonts, emoji, clothing and photos that the pictures are made of, and where they come from.

`python -m tools.tiny_model.assets` fetches the Debian packages below with apt-get and unpacks them, without
root, into FOLDER. Nothing of it is shipped; every licence allows a model trained on it to be given away
(`docs/embedded-model.md` lists them).
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tools.tiny_model.names import EMOJI

FOLDER = Path(os.environ.get("TINY_MODEL_ASSETS") or Path.home() / ".cache" / "vlm-pipeline" / "tiny_model")
PACKAGES = (
    "dataset-fashion-mnist", "fonts-noto-color-emoji", "fonts-dejavu-core", "fonts-dejavu-extra",
    "fonts-liberation2", "fonts-roboto-unhinted",
    "fonts-open-sans", "fonts-lato", "fonts-cantarell", "fonts-hack", "fonts-comic-neue", "fonts-inconsolata",
    "fonts-crosextra-carlito",
    "fonts-crosextra-caladea", "fonts-quicksand", "fonts-courier-prime", "fonts-cabin", "fonts-ebgaramond",
)  # fmt: skip
# Families of typefaces, by how their files begin. A held-out one is in no training picture.
FONTS = (
    "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSansCondensed.ttf",
    "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf",
    "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "LiberationSans-Regular.ttf", "LiberationSans-Bold.ttf",
    "LiberationSans-Italic.ttf",
    "LiberationSerif-Regular.ttf", "LiberationSerif-Bold.ttf", "LiberationSerif-Italic.ttf",
    "LiberationMono-Regular.ttf",
    "OpenSans-Regular.ttf", "OpenSans-Bold.ttf", "OpenSans-Semibold.ttf", "OpenSans-CondBold.ttf",
    "Lato-Regular.ttf", "Lato-Bold.ttf", "Lato-Black.ttf", "Lato-Italic.ttf", "Hack-Regular.ttf",
    "Hack-Bold.ttf", "ComicNeue-Regular.otf",
    "ComicNeue-Bold.otf", "Inconsolata.otf", "Carlito-Regular.ttf", "Carlito-Bold.ttf", "Caladea-Regular.ttf",
    "Caladea-Bold.ttf",
    "Courier Prime.otf", "Courier Prime Bold.otf", "EBGaramond12-Regular.otf", "EBGaramond12-Bold.otf",
    "Quicksand-Bold.ttf",
)  # fmt: skip
HELD_OUT_FONTS = (
    "Roboto-Regular.ttf", "Roboto-Bold.ttf", "Roboto-Medium.ttf", "RobotoCondensed-Bold.ttf",
    "Cantarell-Regular.otf", "Cantarell-Bold.otf",
    "Cabin-Regular.otf", "Cabin-Bold.otf",
)  # fmt: skip
EMOJI_SIZE = 109  # the only size, in pixels, that the bitmap font has
PHOTOS = (
    "astronaut.png",
    "camera.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "brick.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
)
HELD_OUT_PHOTOS = ("chelsea.png", "clock_motion.png")


@cache
def _files() -> dict[str, Path]:
    places = (FOLDER, Path("/usr/share/fonts"), Path("/usr/share/datasets"))
    return {
        path.name: path
        for place in reversed(places)
        if place.is_dir()
        for path in place.rglob("*")
        if path.is_file()
    }


@cache
def fonts(held_out: bool) -> tuple[str, ...]:
    """Paths of the fonts that are there.

    Without the packages, training text stands in the font inside Pillow, named "".
    """
    found = tuple(str(_files()[name]) for name in (HELD_OUT_FONTS if held_out else FONTS) if name in _files())
    return found if found or held_out else ("",)


@cache
def emoji(name: str) -> Image.Image | None:
    """The emoji on a transparent ground, [136, 128] or so; None without the font."""
    path = _files().get("NotoColorEmoji.ttf")
    if path is None:
        return None
    face = ImageFont.truetype(str(path), EMOJI_SIZE)
    box = face.getbbox(EMOJI[name])
    image = Image.new("RGBA", (int(box[2] - box[0]), int(box[3] - box[1])), (0, 0, 0, 0))
    ImageDraw.Draw(image).text((-box[0], -box[1]), EMOJI[name], font=face, embedded_color=True)
    return image


@cache
def clothes(test: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """Fashion-MNIST: pictures [N, 28, 28] uint8 (light on black) and classes [N]; None without the
    package."""
    part = "t10k" if test else "train"
    names = (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz")
    if any(name not in _files() for name in names):
        return None
    pixels, labels = (np.frombuffer(gzip.decompress(_files()[name].read_bytes()), np.uint8) for name in names)
    return pixels[16:].reshape(-1, 28, 28), labels[8:]


@cache
def photos(held_out: bool) -> tuple[Image.Image, ...]:
    """Photos that come with scikit-image."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        return ()
    paths = (Path(spec.origin).parent / "data" / name for name in (HELD_OUT_PHOTOS if held_out else PHOTOS))
    return tuple(Image.open(path).convert("RGB") for path in paths if path.is_file())


def missing(for_exams: bool = False) -> list[str]:
    """What is not there of all that training, or the exams, draw from."""
    part = "t10k" if for_exams else "train"
    names = [*FONTS, "NotoColorEmoji.ttf", f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"]
    lacking = [name for name in (*names, *(HELD_OUT_FONTS if for_exams else ())) if name not in _files()]
    has_photos = len(photos(False)) == len(PHOTOS) and (
        not for_exams or len(photos(True)) == len(HELD_OUT_PHOTOS)
    )
    return lacking if has_photos else [*lacking, "the photos of scikit-image"]


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=scratch, check=True, stdout=sys.stderr)
        for package in sorted(Path(scratch).glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(FOLDER)], check=True)
    print(
        f"{len(fonts(False))} fonts for training and {len(fonts(True))} held out, "
        f"{sum(emoji(name) is not None for name in EMOJI)} emoji,"
    )
    print(
        f"clothing {'found' if clothes(False) else 'missing'}, {len(photos(False))} photos and "
        f"{len(photos(True))} held out in {FOLDER}"
    )


if __name__ == "__main__":
    main()
