"""What a checkpoint says of itself, and the contract of a family: everything before the tower that differs
between vision-language models. Without torch.

A family reads `config.json` into a `ModelInfo`. It knows geometry: the size at which a picture is seen,
which frames of a video are seen, how an item is cut into chunks. It knows prompting: what an item becomes in
the prompt, and the positions of the prompt's tokens. Families differ from each other in these methods only.
One whose tower or decoder has numbers of its own puts them into a subclass of `VisionInfo` or `TextInfo`.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

from pipeline.wire.base import GridTHW
from pipeline.wire.generation import Span
from pipeline.wire.handles import ITEM_SIZES
from pipeline.wire.packing import Int32Array

MAX_ASPECT_RATIO = 200  # of a picture; the processors of all families refuse thinner ones
# Patches of one chunk of a video. A ViT packs several chunks into one forward, and encodes the first of them
# while others are still being decoded.
VIDEO_CHUNK_PATCHES = 1024


class ImageSize(NamedTuple):
    height: int
    width: int


class EmbeddingSpec(NamedTuple):
    """The embeddings of one chunk: a matrix with a row for each token."""

    num_rows: int
    width: int  # the LLM's hidden size, times (1 + k) where k further layers take features
    dtype: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_rows, self.width

    @property
    def nbytes(self) -> int:
        return self.num_rows * self.width * ITEM_SIZES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextInfo:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    # How many frequencies, side by side, turn with time, height and width. Empty: the decoder defines its
    # own rotary embedding.
    mrope_section: tuple[int, ...] = ()

    @property
    def has_dense_mlps(self) -> bool:
        """Whether any layer has an MLP of `intermediate_size`."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInfo:
    """How videos are sampled, and the area of each frame."""

    fps: float
    min_frames: int
    max_frames: int
    min_pixels: int
    max_pixels: int
    max_total_pixels: int  # of all frames together, so that long videos are seen in smaller frames


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionInfo:
    depth: int
    embed_dim: int  # of the tower's layers
    num_heads: int
    intermediate_size: int  # of the MLPs in the tower's layers
    embedding_width: int  # numbers in a row of embeddings, as the LLM takes them
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    min_pixels: int
    max_pixels: int

    @property
    def factor(self) -> int:
        """Sides of resized pictures are multiples of this."""
        return self.patch_size * self.merge_size

    @property
    def largest_pixels(self) -> int:
        """An upper bound on the pixels of a resized picture.

        Thin pictures may pass `max_pixels`, since sides are rounded to `factor`: most so where a request
        wants at least `max_pixels`.
        """
        factor, ratio = self.factor, math.sqrt(MAX_ASPECT_RATIO)
        rounding = factor * math.sqrt(self.max_pixels) * (ratio + 1 / ratio)
        return math.ceil(self.max_pixels + rounding + factor * factor)

    def grid_of(self, size: ImageSize, num_frames: int = 1) -> GridTHW:
        """The patches of so many frames of a size; the last frame fills up a temporal patch."""
        temporal = -(-num_frames // self.temporal_patch_size)
        return GridTHW(temporal, size.height // self.patch_size, size.width // self.patch_size)

    def num_tokens(self, grid: GridTHW) -> int:
        return grid.num_patches // self.merge_size**2

    def embedding(self, grid: GridTHW, dtype: str) -> EmbeddingSpec:
        """What the tower makes of a chunk."""
        return EmbeddingSpec(self.num_tokens(grid), self.embedding_width, dtype)

    def largest_embedding(self, dtype: str) -> EmbeddingSpec:
        """No chunk's embeddings have more rows."""
        return EmbeddingSpec(-(-self.largest_pixels // self.factor**2), self.embedding_width, dtype)

    def with_pixel_limits(self, min_pixels: int | None, max_pixels: int | None) -> Self:
        """The same with the server's limits in place of the model's. Raises ValueError when they cross."""
        low = self.min_pixels if min_pixels is None else min_pixels
        high = self.max_pixels if max_pixels is None else max_pixels
        if low > high:
            raise ValueError(f"min_pixels {low} is above max_pixels {high}")
        return dataclasses.replace(self, min_pixels=low, max_pixels=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    family: Family
    folder: Path
    text: TextInfo
    vision: VisionInfo
    video: VideoInfo
    image_token_id: int
    video_token_id: int
    eos_token_ids: tuple[int, ...]
    default_sampling: Mapping[str, float]  # the model's own temperature, top_p and so on
    # The names of the forms in which the model writes calls and thoughts; auto: as its chat template shows.
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"

    def __post_init__(self) -> None:
        """Raises ValueError where a frame may be larger than a picture: pools have room for these."""
        if self.video.max_pixels > self.vision.max_pixels:
            what = f"a frame may have {self.video.max_pixels} pixels, a picture {self.vision.max_pixels}"
            raise ValueError(f"model {str(self.folder)!r}: {what}")

    @property
    def video_chunk_patches(self) -> int:
        """A video goes through the ViTs in chunks of so many patches, or of one temporal patch if that has
        more.

        A chunk's grid is never larger than a picture's may be.
        """
        return min(VIDEO_CHUNK_PATCHES, self.vision.max_pixels // self.vision.patch_size**2)

    @property
    def largest_pixel_bytes(self) -> int:
        """An upper bound on the pixels, in bytes, of a chunk."""
        vision = self.vision
        frame = dataclasses.replace(vision, max_pixels=self.video.max_pixels).largest_pixels
        piece = vision.temporal_patch_size * max(frame, self.video_chunk_patches * vision.patch_size**2)
        return 3 * max(vision.largest_pixels, piece)


class AreaLimits(NamedTuple):
    """The least and the largest area of a picture or frame, in pixels."""

    min_pixels: int
    max_pixels: int


class SampledFrames(NamedTuple):
    """Which frames of a video are seen."""

    numbers: tuple[int, ...]  # in the source
    num_source_frames: int  # among which they were chosen
    source_fps: float | None  # None: frames came as a list of pictures, and nobody said at which rate
    times: tuple[float, ...] | None = None  # in seconds, where the request says them of each frame


class MediaInfo(NamedTuple):
    """A picture or a video as the model sees it: all that prompting may depend on."""

    grid_thw: GridTHW
    frames: SampledFrames | None = None  # of a video


class Placeholders(NamedTuple):
    """A run of tokens in the prompt whose places embeddings take."""

    num_tokens: int


class WithoutMarks(NamedTuple):
    """The special tokens that the chat template wrote next to the item are left out."""

    before: str
    after: str


# Text may spell special tokens. The run's token is the one that the chat template wrote for the item.
Segment = str | Placeholders | WithoutMarks


class PlacedMedia(NamedTuple):
    """An item and where its placeholders are in the prompt."""

    media: MediaInfo
    spans: tuple[Span, ...]


class Positions(NamedTuple):
    rows: Int32Array  # [3, num_tokens]
    delta: int  # what a token after the prompt adds to its index


class Family(ABC):
    """Has no state: a model's numbers come in as its `ModelInfo`."""

    model_type: ClassVar[str]  # in config.json
    tower: ClassVar[str]  # the module that names a `TOWER`; families share towers
    decoder: ClassVar[str]  # the module that names a `DECODER`; families share decoders
    # The prompt depends on when frames were taken: a list of frames may say how many there are a second.
    has_frame_times: ClassVar[bool] = False

    @abstractmethod
    def read(self, folder: Path, min_pixels: int | None, max_pixels: int | None) -> ModelInfo:
        """What a checkpoint says, with the server's limits of a picture's area in place of its own.

        Raises ValueError, naming the key, where one is missing that has no safe default.
        """

    # Geometry.

    @abstractmethod
    def picture_size(self, size: ImageSize, limits: AreaLimits, info: ModelInfo) -> ImageSize:
        """At which size a picture is seen."""

    @abstractmethod
    def frame_size(
        self, size: ImageSize, num_frames: int, limits: AreaLimits, max_total_pixels: int, info: ModelInfo
    ) -> ImageSize:  # fmt: skip
        """At which size each of so many frames is seen.

        Raises ValueError, with a reason for clients, for a video that the model's processor refuses.
        """

    @abstractmethod
    def sample_frames(
        self,
        num_source_frames: int,
        source_fps: float,
        fps: float,
        min_frames: int,
        max_frames: int,
        info: ModelInfo,
    ) -> list[int]:
        """Which frames of a video are seen, in order, about `fps` of them a second."""

    def chunk_length(self, grid: GridTHW, num_vits: int, info: ModelInfo) -> int:
        """Temporal patches of a video in one chunk: these or fewer, since pools have room for no more.

        Frames do not attend to each other in any tower so far, so a video may be cut between any two of them.
        """
        return min(max(1, info.video_chunk_patches // (grid.h * grid.w)), -(-grid.t // num_vits))

    # Prompting.

    @abstractmethod
    def segments(self, media: MediaInfo, info: ModelInfo) -> tuple[Segment, ...]:
        """What takes the place of the one token that the chat template writes for an item. `WithoutMarks`
        comes first."""

    @abstractmethod
    def positions(self, num_tokens: int, items: Sequence[PlacedMedia], info: ModelInfo) -> Positions:
        """Of a prompt's tokens. Items are in the order of the prompt."""

    def kv_hash(self, mm_hash: bytes, media: MediaInfo, info: ModelInfo) -> bytes:
        """Key of an item in the prefix cache.

        `mm_hash` is the key of the tower's output. Where positions depend on more than the grid, `kv_hash`
        must depend on that, too, and `mm_hash` must not.
        """
        return mm_hash
