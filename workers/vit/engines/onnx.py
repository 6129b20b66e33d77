"""The encoder as an ONNX file: exported by ourselves, once for a checkpoint and a type, and kept in the
user's cache folder.

Frames of one size are a batch without a mask, so that no picture sees another and runtimes take their fused
attention. What depends on the size comes in as inputs, whose names, types and axes the tower says. What
comes out:

    embeddings [frames, num_tokens, width]
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib
import json
import logging
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from pipeline.families import ModelInfo
from workers.nn.loader import Progress
from workers.nn.weights.dense import Dense, TorchLinear
from workers.nn.weights.registry import open_weights
from workers.vit.models.base import Axis, EncodeJob, Encoder, Inputs, InputSpec
from workers.vit.models.registry import tower_of

logger = logging.getLogger(__name__)
VERSION = 3  # of what is exported: a change in the arithmetic of a tower of ours makes old files useless
LIMITS = ("min_pixels", "max_pixels")  # of what is encoded: no encoder depends on them
OPSET = 23  # the first with an Attention operator
OUTPUT = "embeddings"
FILE = "encoder.onnx"
REPORT_S = 1.0  # between two reports of an export
WORKING_S = 0.01  # of processor time: less is a process that stands still
WAIT_S = 1.0  # between two looks whether another process has made what is wanted


class _Exported(nn.Module):
    """What `torch.onnx` wants to see; the weights travel as constants."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self._encoder = encoder
        self._names = [spec.name for spec in encoder.preparation.specs]

    def forward(self, *tensors: Tensor) -> Tensor:
        return self._encoder.forward(Inputs(dict(zip(self._names, tensors, strict=True)), {}))


def export(encoder: Encoder, file: Path) -> None:
    """Writes the file, and its weights beside it, in the encoder's type."""
    specs, tensors = encoder.preparation.specs, _sample(encoder)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # which has much to say of what is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own deprecations, and names of axes
        program = torch.onnx.export(
            _Exported(encoder).eval(), tensors,
            input_names=[spec.name for spec in specs], output_names=(OUTPUT,),
            dynamic_shapes=(_dynamic_shapes(specs),), opset_version=OPSET, dynamo=True, verbose=False,
        )  # fmt: skip
    assert program is not None
    program.save(file, external_data=True)


def _sample(encoder: Encoder) -> tuple[Tensor, ...]:
    """Inputs of the preparation's sample."""
    preparation, info = encoder.preparation, encoder.preparation.info
    grid = preparation.sample_grid
    size = (grid.h * info.patch_size, grid.w * info.patch_size)
    pixels = torch.zeros(grid.t * info.temporal_patch_size, *size, 3, dtype=torch.uint8)
    output = torch.empty(info.num_tokens(grid), info.embedding_width)
    tensors = preparation.batch([EncodeJob(pixels, grid, output)], encoder.device).tensors
    return tuple(tensors[spec.name] for spec in preparation.specs)


def _dynamic_shapes(specs: Sequence[InputSpec]) -> tuple[dict[int, Any], ...]:
    """For each input its axes without a fixed size, as `torch.export` wants to be told."""
    dims: dict[str, Any] = {}  # by axis: inputs share them
    shapes: list[dict[int, Any]] = []
    for spec in specs:
        shape: dict[int, Any] = {}
        for number, axis in enumerate(spec.axes):
            if isinstance(axis, Axis):
                if axis.name not in dims:
                    dims[axis.name] = _dim(axis)
                shape[number] = dims[axis.name]
        shapes.append(shape)
    return tuple(shapes)


def _dim(axis: Axis) -> Any:
    dim = torch.export.Dim(axis.name, min=1, max=axis.most // axis.multiple)
    return dim if axis.multiple == 1 else axis.multiple * dim


def exported(info: ModelInfo, folder: Path, dtype: torch.dtype, cache: Path, progress: Progress) -> Path:
    """The file for the checkpoint in `folder`, exported now if it is not in the cache yet.

    One process exports, others wait for it. Raises ValueError for weights in a format that is not known.
    """
    tower = tower_of(info)
    place = cache / "onnx" / _key(info, folder, dtype)
    with locked(place, progress):
        if not (place / FILE).exists():
            logger.info("exporting the vision encoder to %s", place)
            with unfinished(place) as draft:
                weights = open_weights(
                    folder, dtype, torch.device("cpu"), progress=progress, dense=Dense(TorchLinear)
                )
                weights.expect(tower.prefix)
                encoder = tower.encoder(info.vision, weights)  # which reports by itself
                with reported(progress):
                    export(encoder, draft / FILE)
                weights.close()
    return place / FILE


@contextmanager
def reported(progress: Progress) -> Iterator[None]:
    """Reports from a thread that the work within goes on, since `torch.onnx` says nothing for minutes; not
    while it takes no processor time, so that the launcher's start timeout ends one that hangs.

    Nobody else may report meanwhile: `progress` sends on a socket.
    """
    is_over = threading.Event()

    def report() -> None:
        before = time.process_time()
        while not is_over.wait(REPORT_S):
            if (now := time.process_time()) - before >= WORKING_S:
                before = now
                progress(0, 1)

    thread = threading.Thread(target=report, name="report")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


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


def _key(info: ModelInfo, folder: Path, dtype: torch.dtype) -> str:
    """Files are told apart by name, size and time of change: reading gigabytes at each start would take
    longer than the export.
    """
    stats = [(path.name, path.stat()) for path in sorted(folder.resolve().glob("*.safetensors"))]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    shape = {name: value for name, value in dataclasses.asdict(info.vision).items() if name not in LIMITS}
    inputs = repr(tower_of(info).preparation(info.vision).specs)
    tower = info.family.tower, _source(info.family.tower), shape, inputs
    told = json.dumps([VERSION, OPSET, torch.__version__, str(dtype), str(folder.resolve()), tower, files])
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def _source(tower: str) -> str:
    """A digest of the code beside the module of a tower that another package brings; of ours, `VERSION`
    tells."""
    if tower.partition(".")[0] == __name__.partition(".")[0]:
        return ""
    module = importlib.import_module(tower)
    assert module.__file__ is not None
    file, digest = Path(module.__file__), hashlib.sha256()
    for path in sorted(file.parent.glob("*.py")) if module.__package__ else [file]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
