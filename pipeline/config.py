"""Configuration: one frozen dataclass a role. An option's default, type and help live here only; the command line is read off.

What is learned at run time (the number of KV blocks, say) is not configuration: it is returned in `WorkerReady`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.faults import Fault
from pipeline.log import LEVELS

MIB = 1 << 20
HTTP_URL = re.compile(r"http://([^\s/?#@]+@)?([^\s/?#@:\[\]]+|\[[0-9a-fA-F:.]+\])(:[0-9]+)?/?")
CONTACT = re.compile(r"[ !-'*-~]{0,200}")  # stands in round brackets in a header
MAX_OPEN_CHUNKS = 1 << 16  # each takes at most four messages on an edge: all together stay below the high-water mark
MAX_KEY_BYTES = 48 << 10  # of all API keys: the configuration goes to each worker in one message, of 64 KiB
KEY_OVERHEAD = 16  # bytes of each one there
MAX_ITEMS = 1024  # pictures of one request, with those that are frames of a video: each may ride in a frame of its own
MAX_MESSAGES = 1024  # of one request
MAX_PARTS = 4096  # of all messages of one request
DTYPES = ("auto", "float32", "bfloat16", "float16")


def option(default: Any, text: str, choices: tuple[str, ...] = (), metavar: str = "", aliases: tuple[str, ...] = ()) -> Any:
    """A field that is also an option of the command line."""
    return field(default=default, metadata={"help": text, "choices": choices, "metavar": metavar, "aliases": aliases})


def _at_least(config: object, **limits: float) -> None:
    for name, limit in limits.items():
        if (value := getattr(config, name)) is not None and not limit <= value < math.inf:
            raise ValueError(f"{name} must be at least {limit} and finite, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    model: str = option("", "folder or hub name of a Qwen2-VL checkpoint (safetensors); without it the embedded model runs", metavar="MODEL")
    served_model_name: str = option("", "name of the model in the API (default: as given to --model)", metavar="NAME")
    download_from: str = option("huggingface", "where a hub name is looked up", choices=("huggingface", "modelscope"))
    dtype: str = option(
        "auto",
        "type of weights and activations; auto: bfloat16 where native, else float16 on GPUs, float32",
        choices=DTYPES,
    )
    device: str = option("auto", "auto: CUDA if there is a GPU, else the CPU", choices=("auto", "cpu", "cuda"))
    max_model_len: int | None = option(None, "longest prompt plus output, in tokens (default: what the model was made for)", metavar="TOKENS")

    def __post_init__(self) -> None:
        _at_least(self, max_model_len=16)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key of the endpoint. Several may have one name: they are one client's."""

    name: str
    key: str = field(repr=False)

    @classmethod
    def unnamed(cls, key: str) -> ApiKey:
        return cls(f"key-{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}", key)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiConfig:
    host: str = option("127.0.0.1", "address to listen on", metavar="ADDRESS")
    port: int = option(8000, "port to listen on", metavar="PORT")
    api_key: tuple[str, ...] = option(
        (),
        "key that clients must send; several may be given, also by --api-key-file and VLM_API_KEY",
        metavar="KEY",
    )
    api_key_file: str = option(
        "",
        "file with a key in each line, as NAME:KEY; # begins a comment",
        metavar="FILE",
    )
    named_keys: tuple[ApiKey, ...] = ()  # of the file and the environment: no option of its own
    key_is_in_environment: bool = False  # the variable's value is a key, as a shell may put it into a header
    admin_key: str = option("", "key for POST /admin/reload; without it there is no such route", metavar="KEY")
    max_request_mib: int = option(64, "largest HTTP body, in MiB", metavar="MIB")
    api_memory_mib: int | None = option(
        None,
        "memory for HTTP bodies, coming in or of open requests, in MiB; more wait a moment, then get 503 "
        "(default: a sixteenth of the machine's, but room for 4 to 16 of the largest)",
        metavar="MIB",
    )
    trust_forwarded_for: bool = option(
        False, "a client without a key is told by the last address of X-Forwarded-For: only behind a proxy that sets it"
    )

    def __post_init__(self) -> None:
        _at_least(self, port=0, max_request_mib=1)
        _at_least(self, api_memory_mib=2 * self.max_request_mib)
        self._check_keys()
        if self.port > 65535:
            raise ValueError(f"port must be at most 65535, got {self.port}")

    def _check_keys(self) -> None:
        names: dict[str, str] = {}
        for key in self.keys:
            if not key.key or not key.key.isprintable() or " " in key.key:
                raise ValueError(f"the API key {key.name!r} must have printable characters without spaces")
            if (other := names.setdefault(key.key, key.name)) != key.name:
                raise ValueError(f"the API keys {other!r} and {key.name!r} are the same")
        if (size := sum(len(key.name) + len(key.key.encode()) + KEY_OVERHEAD for key in self.keys)) > MAX_KEY_BYTES:
            raise ValueError(f"API keys, their names and {KEY_OVERHEAD} bytes for each may have {MAX_KEY_BYTES} bytes together, got {size}")

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        """All keys; without one everybody is served."""
        return (*self.named_keys, *map(ApiKey.unnamed, self.api_key))


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectConfig:
    direct_port: int | None = option(
        None, "first of three tcp ports for clients on other machines, straight over ZeroMQ, encrypted (default: none)", metavar="PORT"
    )
    direct_host: str = option("127.0.0.1", "address to listen on for them", metavar="ADDRESS")
    direct_keys: str = option("", "folder of CURVE keys that tools/keys.py has made: the server's and its clients'", metavar="FOLDER")

    def __post_init__(self) -> None:
        if (self.direct_port is not None) != bool(self.direct_keys):
            raise ValueError("direct_port and direct_keys go together")
        if self.direct_port is not None and not 1 <= self.direct_port <= 65533:
            raise ValueError(f"direct_port must be at least 1 and at most 65533, got {self.direct_port}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessConfig:
    allowed_local_media_path: str = option("", "folder from which requests may name files; without it none", metavar="FOLDER")
    allowed_media_domains: tuple[str, ...] = option((), "if given, the only hosts that media URLs may name", metavar="HOST")
    allow_private_media: bool = option(False, "let media URLs reach private, loopback and link-local addresses")
    media_proxy: str = option(
        "", "HTTP proxy for media URLs: it resolves their names, and has to keep them from private "
        "addresses; no variable of the environment is read (default: none)", metavar="URL"
    )  # fmt: skip
    media_contact: str = option(
        "", "mail address or URL of who runs this server, for the User-Agent that hosts of media see: some "
        "demand it", metavar="TEXT"
    )  # fmt: skip
    media_timeout_s: float = option(10.0, "time for one media download, in seconds", metavar="SECONDS")
    max_media_mib: int = option(50, "largest media file, in MiB", metavar="MIB")
    max_image_pixels: int = option(64_000_000, "largest picture before resizing, in pixels, judged by its header", metavar="PIXELS")
    max_items_per_request: int = option(64, "most pictures and videos in one request", metavar="N")
    min_pixels: int | None = option(None, "pictures are enlarged to at least this (default: the model's)", metavar="PIXELS")
    max_pixels: int | None = option(
        None, "pictures, and frames of videos, are reduced to at most this (default: the model's; on a CPU 1280 tokens)",
        metavar="PIXELS",
    )  # fmt: skip
    max_video_mib: int = option(256, "largest video file, in MiB; it is kept in a temporary file without a name", metavar="MIB")
    max_video_frames: int | None = option(None, "most frames of a video that the model sees (default: the model's)", metavar="N")
    video_reader: str = option(
        "pyav", "what decodes videos; decord: from the extra vlm-pipeline[decord], right in fewer containers",
        choices=("pyav", "decord"),
    )  # fmt: skip
    picture_timeout_s: float = option(10.0, "processor time to read a picture, in seconds", metavar="SECONDS")
    video_timeout_s: float = option(60.0, "processor time to read a video, in seconds", metavar="SECONDS")
    media_memory_mib: int = option(4096, "memory to read a picture or piece of video, in MiB", metavar="MIB")
    pixel_pool_mib: int = option(256, "memory for decoded pixels on their way to the ViTs, in MiB", metavar="MIB")
    max_open_media_mib: int = option(
        1024,
        "texts and encoded media of all open requests together, in memory and in files, in MiB; see docs/fairness.md",
        metavar="MIB",
    )
    preprocess_memory_mib: int | None = option(
        None, "memory that preprocessing may take beside its pool and the processes that read media, in MiB "
        "(default: what the limits of media allow for)", metavar="MIB"
    )  # fmt: skip
    max_open_requests: int = option(
        512,
        "requests in the pipeline at once; a tenant that has its share gets 429, then all get 503",
        metavar="N",
    )
    allow_priority: tuple[str, ...] = option(
        (),
        "name of an API or CURVE key whose requests may have a priority, or all; several may be given",
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        _at_least(
            self,
            max_media_mib=1,
            max_image_pixels=1,
            max_items_per_request=0,
            pixel_pool_mib=0,
            max_open_requests=1,
            max_open_media_mib=1,
            media_timeout_s=0.1,
            max_video_mib=1,
            picture_timeout_s=0.01,
            video_timeout_s=0.1,
            media_memory_mib=1,
            preprocess_memory_mib=1,
        )
        _at_least(self, min_pixels=1, max_pixels=1, max_video_frames=2)
        if (product := self.max_open_requests * self.max_items_per_request) > MAX_OPEN_CHUNKS:
            raise ValueError(f"max_open_requests times max_items_per_request must be at most {MAX_OPEN_CHUNKS}, got {product}")
        if self.max_items_per_request > MAX_ITEMS:
            raise ValueError(f"max_items_per_request must be at most {MAX_ITEMS}, got {self.max_items_per_request}")
        if self.video_reader == "decord" and importlib.util.find_spec("decord") is None:
            raise ValueError("video_reader 'decord' needs the package decord: install vlm-pipeline[decord]")
        if self.allowed_local_media_path and not Path(self.allowed_local_media_path).is_dir():
            raise ValueError(f"allowed_local_media_path {self.allowed_local_media_path!r} is no folder")
        self._check_media_options()
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels must be at most max_pixels, got {self.min_pixels} and {self.max_pixels}")

    def _check_media_options(self) -> None:
        if self.media_proxy and not HTTP_URL.fullmatch(self.media_proxy):
            raise ValueError("media_proxy must be http://HOST:PORT, or http://USER:PASSWORD@HOST:PORT")
        if not CONTACT.fullmatch(self.media_contact):
            limits = "at most 200 ASCII characters without brackets"
            raise ValueError(f"media_contact must be {limits}, got {self.media_contact!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class VitConfig:
    vit: int | None = option(None, "number of ViT processes (default: as many as LLM ranks)", metavar="N")
    vit_cores: int | None = option(None, "CPU cores of all ViTs together (default: a quarter; more are shared with the LLM)", metavar="N")
    vit_engine: str = option(
        "auto", "what computes the ViT; tensorrt, onnxruntime: from an ONNX file exported at the first start; auto: these on GPUs where they load",
        choices=("auto", "torch", "onnxruntime", "tensorrt"),
    )  # fmt: skip
    vit_max_batch_patches: int | None = option(
        None, "most patches in one forward of a ViT (default: 4096 on GPUs, 1024 on the CPU, which gains nothing by more)", metavar="PATCHES"
    )
    vit_slice_ms: float | None = option(
        None, "longest turn of a ViT on its device, in milliseconds: batches are made so small; 0: as they come (default: 10 on GPUs)", metavar="MS"
    )
    embedding_transport: str = option(
        "auto", "how embeddings reach the LLM; cuda_ipc: in place; host: through host memory; auto: cuda_ipc where ViT and driver can",
        choices=("auto", "cuda_ipc", "host"),
    )  # fmt: skip
    embedding_pool_mib: int = option(256, "memory of each ViT for embeddings, in use or cached, in MiB", metavar="MIB")

    def __post_init__(self) -> None:
        _at_least(self, vit=1, vit_cores=1, vit_max_batch_patches=4, vit_slice_ms=0, embedding_pool_mib=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmConfig:
    tp: int = option(1, "tensor parallel: LLM ranks, each on a GPU of its own", metavar="N", aliases=("--tensor-parallel-size",))
    dp: int = option(1, "data parallel: groups of --tp ranks; each request runs in one of them", metavar="N", aliases=("--data-parallel-size",))
    max_num_seqs: int = option(64, "requests computed at once", metavar="N")
    max_num_batched_tokens: int = option(2048, "tokens computed in one step", metavar="TOKENS")
    block_size: int = option(16, "tokens of one KV cache block", metavar="TOKENS")
    kv_cache_gib: float | None = option(
        None, "memory for the KV cache of each rank, in GiB (default: 1 on the CPU, on a GPU what --gpu-memory-utilization leaves)", metavar="GIB"
    )
    gpu_memory_utilization: float = option(0.9, "share of a GPU's memory for all that runs there: ViT, weights, KV cache", metavar="SHARE")
    llm_cores: int | None = option(
        None, "CPU cores of all LLM ranks together (default: all but a quarter, which the ViTs have; more are shared with them)", metavar="N"
    )
    quantization: str = option("none", "int8: weights in 8 bits, activations too, token by token; on the CPU only", choices=("none", "int8"))
    prefix_caching: bool = option(True, "keep computed prompts, text and pictures, for requests that begin alike")
    max_itl_stretch: float = option(1.25, "prompts may make the steps of running streams so many times longer; 0: as they like", metavar="RATIO")
    attention: str = option(
        "auto", "what computes attention; auto: triton on GPUs, torch on the CPU; flash3: FlashAttention-3, where it is installed",
        choices=("auto", "torch", "triton", "flash3"),
    )  # fmt: skip
    all_reduce: str = option(
        "nccl", "how ranks add up; symmetric: small sums through memory that all GPUs have mapped (NVLink)", choices=("nccl", "symmetric")
    )
    cuda_graphs: bool = option(True, "run decode steps as CUDA graphs, where attention is not torch's")
    overlap: str = option("auto", "prepare the next step while one runs; auto: on GPUs", choices=("auto", "on", "off"))

    def __post_init__(self) -> None:
        _at_least(self, tp=1, dp=1, llm_cores=1, max_num_seqs=1, max_num_batched_tokens=1, block_size=1)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}")
        if self.kv_cache_gib is not None and not 0 < self.kv_cache_gib < math.inf:
            raise ValueError(f"kv_cache_gib must be above 0 and finite, got {self.kv_cache_gib}")
        if self.max_itl_stretch and not 1 < self.max_itl_stretch < math.inf:
            raise ValueError(f"max_itl_stretch must be above 1 and finite, or 0, got {self.max_itl_stretch}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(f"max_num_batched_tokens must be at least max_num_seqs, got {self.max_num_batched_tokens} and {self.max_num_seqs}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherConfig:
    run_dir: str = option("", "folder for the pipeline's sockets, one launcher each (default: a new private one)", metavar="FOLDER")
    gpu_sharing: str = option(
        "auto", "how ViT and LLM share a GPU; mps: at once, by a private MPS daemon; timeslice: in turns; auto: mps where it works",
        choices=("auto", "mps", "timeslice"),
    )  # fmt: skip
    cpu_sharing: str = option(
        "elastic",
        "elastic: on the CPU, LLM and ViTs have all cores while the others idle; fixed: each only its own",
        choices=("elastic", "fixed"),
    )
    cache_dir: str = option("", "folder for exported and built encoders (default: vlm-pipeline in the user's cache folder)", metavar="FOLDER")
    trace_dir: str = option("", "folder in which each worker writes what it does when, for tools/trace.py", metavar="FOLDER")
    log_level: str = option("info", "least important lines to show", choices=LEVELS)
    shutdown_timeout: float = option(10.0, "seconds that open requests get to finish after Ctrl-C", metavar="SECONDS")
    max_attempts: int = option(3, "a request is given up (503) when so many workers died while it executed there without a new token", metavar="N")
    recovery_timeout: float = option(60.0, "seconds that a request waits for the successor of a worker that died; then 503", metavar="SECONDS")
    hang_timeout: float = option(
        120.0, "seconds without any progress after which a worker counts as hung and is replaced; 0: never", metavar="SECONDS"
    )

    fault: tuple[str, ...] = option((), "for tests: what is to go wrong, see pipeline/faults.py", metavar="ROLE:ACTION:WHAT[:NUMBER]")

    def __post_init__(self) -> None:
        _at_least(self, shutdown_timeout=0, max_attempts=1, recovery_timeout=0, hang_timeout=0)
        for text in self.fault:
            Fault.parse(text)
        if self.trace_dir and not Path(self.trace_dir).is_dir():
            raise ValueError(f"trace_dir {self.trace_dir!r} is no folder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of it; every worker is given the whole and reads its part."""

    model: ModelConfig = field(default_factory=ModelConfig)
    api: ApiConfig = field(default_factory=ApiConfig)
    direct: DirectConfig = field(default_factory=DirectConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    vit: VitConfig = field(default_factory=VitConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)

    @property
    def num_vits(self) -> int:
        return self.num_ranks if self.vit.vit is None else self.vit.vit

    @property
    def num_ranks(self) -> int:
        """LLM ranks of all groups; group g has the ranks g · tp to (g + 1) · tp - 1, and the first of them leads it."""
        return self.llm.dp * self.llm.tp

    @property
    def has_gateway(self) -> bool:
        return self.direct.direct_port is not None

    @property
    def leads(self) -> tuple[int, ...]:
        return tuple(range(0, self.num_ranks, self.llm.tp))
