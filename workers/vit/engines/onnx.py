"""The encoder as an ONNX file: exported by ourselves, once for a checkpoint and a type, and kept in the user's cache folder.

Frames of one size are a batch without a mask, so that no picture sees another and runtimes take their fused attention. What depends on
the size comes in as inputs:

    patches [frames, num_patches, channels · temporal · patch²] float32, cos and sin [num_patches, 1, head_dim] float32
    → embeddings [frames, num_patches / merge², hidden]
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor, nn

from pipeline.families import VisionInfo
from workers.nn.layers import Linear
from workers.nn.loader import Checkpoint, Progress
from workers.vit.models.qwen2_vl import VisionEncoder

logger = logging.getLogger(__name__)
VERSION = 1  # of what is exported: a change of the encoder's arithmetic or inputs makes old files useless
OPSET = 23  # the first with an Attention operator
INPUTS, OUTPUT = ("patches", "cos", "sin"), "embeddings"
FILE = "encoder.onnx"
WAIT_S = 1.0  # between two looks whether another process has made what is wanted


class _Exported(nn.Module):
    """What `torch.onnx` wants to see; the weights travel as constants."""

    def __init__(self, encoder: VisionEncoder) -> None:
        super().__init__()
        self._encoder = encoder

    def forward(self, patches: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self._encoder(patches, cos, sin)


def export(info: VisionInfo, checkpoint: Checkpoint, file: Path) -> None:
    """Writes the file, and its weights beside it, in the checkpoint's type."""
    encoder = VisionEncoder(info, checkpoint, Linear)
    merged, dim = info.merge_size**2, info.embed_dim // info.num_heads
    patches = torch.zeros(2, 3 * merged, encoder.patch_embed.in_features)
    cos, sin = torch.zeros(3 * merged, 1, dim), torch.zeros(3 * merged, 1, dim)  # two tensors: one would be taken for one input
    frames, quarters = torch.export.Dim("frames", min=1, max=1 << 16), torch.export.Dim("quarters", min=1, max=1 << 18)
    shapes = {"patches": {0: frames, 1: merged * quarters}, "cos": {0: merged * quarters}, "sin": {0: merged * quarters}}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # which has much to say of what is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own deprecations, and names of axes
        program = torch.onnx.export(
            _Exported(encoder).eval(), (patches, cos, sin), input_names=INPUTS, output_names=(OUTPUT,), dynamic_shapes=shapes,
            opset_version=OPSET, dynamo=True, verbose=False,
        )  # fmt: skip
    assert program is not None
    program.save(file, external_data=True)


def exported(info: VisionInfo, folder: Path, dtype: torch.dtype, cache: Path, progress: Progress) -> Path:
    """The file for the checkpoint in `folder`, exported now if it is not in the cache yet. One process exports, others wait for it."""
    place = cache / "onnx" / _key(info, folder, dtype)
    with locked(place, progress):
        if not (place / FILE).exists():
            logger.info("exporting the vision encoder to %s", place)
            with unfinished(place) as draft:
                checkpoint = Checkpoint(folder, dtype, torch.device("cpu"), progress)
                checkpoint.expect("visual.")
                export(info, checkpoint, draft / FILE)
                checkpoint.close()
    return place / FILE


@contextmanager
def locked(place: Path, progress: Progress) -> Iterator[None]:
    """One process at a time makes what is to be at `place`; who waits for another says so all the while."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with place.with_suffix(".lock").open("w") as file:
        while not _has_locked(file):
            progress(0, 1)
            time.sleep(WAIT_S)
        yield


def _has_locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def unfinished(place: Path) -> Iterator[Path]:
    """A folder that becomes `place` when all is in it, and vanishes when something goes wrong."""
    draft = Path(tempfile.mkdtemp(prefix=f"{place.name}.", dir=place.parent))
    try:
        yield draft
        draft.rename(place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _key(info: VisionInfo, folder: Path, dtype: torch.dtype) -> str:
    """Files are told apart by name, size and time of change: reading gigabytes at each start would take longer than the export."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.resolve().glob("*.safetensors"))]
    told = json.dumps([VERSION, OPSET, torch.__version__, str(dtype), str(folder.resolve()), dataclasses.asdict(info), files])
    return hashlib.sha256(told.encode()).hexdigest()[:32]
