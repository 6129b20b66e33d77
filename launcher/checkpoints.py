"""Which model: the embedded one, a local folder, or a name on a hub."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launcher.progress import shown_bytes
from launcher.stored_weights import refuse_gguf, weight_bytes
from pipeline.config import ModelConfig

logger = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parent / "embedded"
EMBEDDED_NAME = "embedded-shapes"
NOTICE = (
    "the embedded model (12 M parameters) answers questions about simple pictures: shapes with their "
    "colors, sizes, places and number, printed "
    "numbers and words, clothing, emoji, bar charts, what differs between pictures, what happens in short "
    "videos; to questions beyond "
    "these it mostly answers that it does not know"
)
FILES = ("*.json", "*.jinja", "*.safetensors", "*.txt")  # weights as safetensors only, and no code


@dataclass(frozen=True, slots=True)
class Model:
    folder: Path
    names: tuple[str, ...]  # in the API; answers show the first
    notice: str = ""
    sample: Path | None = None  # a picture to try it with


def find_model(config: ModelConfig, can_keep: bool = True) -> Model:
    """The model's folder, downloaded if need be (and `can_keep`). Raises ValueError when there is none."""
    if not config.model:
        return Model(
            EMBEDDED / "model",
            _names(config, EMBEDDED_NAME),
            NOTICE,
            EMBEDDED / "samples" / "red-star.png",
        )
    folder = Path(config.model)
    refuse_gguf(config.model, [file.name for file in folder.iterdir()] if folder.is_dir() else [])
    if not folder.is_dir():
        if config.model.startswith((".", "/", "~")):
            raise ValueError(f"model {config.model!r} is no folder")
        if not can_keep:
            raise ValueError(
                f"model {config.model!r} is to be downloaded, but there is no home folder to keep it in: "
                "set HF_HOME, give --cache-dir, or give --model a folder"
            )
        start = time.monotonic()
        logger.info("looking for %s on %s, or in its cache", config.model, config.download_from)
        folder = _download(config.model, config.download_from)
        size = shown_bytes(sum(file.stat().st_size for file in folder.iterdir() if file.is_file()))
        logger.info("%s is in %s: %s, found in %.0f s", config.model, folder, size, time.monotonic() - start)
    if not weight_bytes(folder):
        hint = ": files named so on a hub are mostly GGUF alone" if "gguf" in config.model.lower() else ""
        raise ValueError(f"model {str(folder)!r} has no safetensors files{hint}")
    return Model(folder, _names(config, config.model))


def _names(config: ModelConfig, default: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(config.served_model_name)) or (default,)


def _download(name: str, source: str) -> Path:
    if source == "modelscope":
        try:
            from modelscope import snapshot_download as fetch  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            raise ValueError("--download-from modelscope needs its package: pip install modelscope") from None
        return Path(fetch(name, allow_patterns=list(FILES)))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()  # which would fill a log
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"model {name!r} cannot be downloaded: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None
    except OSError as error:
        hint = "set HF_HOME, or give --model a folder"
        raise ValueError(f"model {name!r} cannot be kept: {error}; {hint}") from None
