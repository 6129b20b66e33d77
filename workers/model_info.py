"""The model that a worker serves: one reading of it for all of them."""

from __future__ import annotations

from pipeline.families import ModelInfo, read_model_info
from pipeline.process.process import WorkerContext


def model_info_of(context: WorkerContext) -> ModelInfo:
    """With the server's limits of a picture's area, which may stand in for what the checkpoint does not say.

    Raises ValueError as `read_model_info` does.
    """
    limits = context.config.preprocess
    return read_model_info(context.model_folder, limits.min_pixels, limits.max_pixels)
