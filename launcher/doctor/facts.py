"""What is to be known of a machine, and where it is read. `findings.py` says what it means."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoints import EMBEDDED
from launcher.cores import cpu_quota
from launcher.environment import cache_folder, home_folder
from launcher.gpu_sharing import CONTROL
from launcher.picture_size import DRIVERS
from pipeline.process.machine import machine_memory

PROBE_TIMEOUT_S = 120.0  # torch's import, from a slow disk
# In a process of its own: torch takes long to import and much memory, and may fail in any way.
PROBE = """
import json
told = {}
try:
    import torch
    told["torch"], told["cuda_build"] = torch.__version__, torch.version.cuda or ""
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        told.setdefault("gpus", []).append([found.name, found.total_memory, found.major, found.minor])
except Exception as error:
    told["torch_error"] = f"{type(error).__name__}: {error}"
else:
    try:
        import workers.nn.native._kernels
    except Exception as error:
        told["kernels_error"] = f"{type(error).__name__}: {error}"
print(json.dumps(told))
"""
REQUIRED = (
    "aiodns", "aiohttp", "av", "huggingface_hub", "jinja2", "msgspec", "numpy", "PIL", "prometheus_client",
    "pybase64", "safetensors", "setproctitle", "tokenizers", "tqdm", "uvloop", "xgrammar", "yarl", "zmq",
)  # fmt: skip
OPTIONAL: Mapping[str, str] = {
    "onnxruntime": "--vit-engine onnxruntime",
    "onnxscript": "--vit-engine onnxruntime and tensorrt",
    "tensorrt": "--vit-engine tensorrt",
    "triton": "kernels on GPUs",
    "fla": "linear attention on GPUs by flash-linear-attention",
    "flash_attn_interface": "--attention flash3",
    "decord": "--video-reader decord",
    "modelscope": "--download-from modelscope",
    "opentelemetry.sdk": "--otlp-traces-endpoint",
}


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    memory: int  # bytes
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Sizes are in bytes. An empty text is what is not there."""

    system: str = "Linux"
    machine: str = "x86_64"
    python: tuple[int, int] = (3, 11)
    processor: str = ""
    flags: frozenset[str] = frozenset()  # of the processor, as Linux names them
    num_cores: int = 1  # of this process's affinity
    quota: float | None = None  # of the control group, in cores
    memory: int = 0
    available: int = 0  # of the memory
    shared_memory: int = 0  # free in /dev/shm
    cache: str = ""  # folder for downloads and exports
    cache_error: str = ""
    disk: int = 0  # free there
    torch: str = ""  # version
    torch_error: str = ""
    cuda_build: str = ""  # the version of CUDA that torch was built for
    gpus: Sequence[Gpu] = ()  # that torch can use
    driver: str = ""
    driver_cuda: str = ""  # the newest version of CUDA that the driver serves
    has_gpu_file: bool = False  # the driver's file is there
    has_mps: bool = False
    kernels_error: str = ""
    compiler: str = ""
    missing: Sequence[str] = ()  # required packages
    missing_optional: Sequence[str] = ()
    has_embedded: bool = True


def gather(environment: Mapping[str, str]) -> Facts:
    probed = _probe(environment)
    gpus = probed.get("gpus", ())
    driver, driver_cuda = _driver(environment)
    cache, cache_error = _cache(environment)
    cpu = _read("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", cpu, re.MULTILINE)
    model = re.search(r"^model name\s*: (.*)$", cpu, re.MULTILINE)
    available = re.search(r"^MemAvailable:\s*(\d+)", _read("/proc/meminfo"), re.MULTILINE)
    is_linux = platform.system() == "Linux"
    return Facts(
        system=platform.system(), machine=platform.machine(), python=sys.version_info[:2],
        processor=model[1] if model else "", flags=frozenset(flags[1].split()) if flags else frozenset(),
        num_cores=len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1, quota=cpu_quota(),
        memory=machine_memory() if is_linux else 0, available=int(available[1]) << 10 if available else 0,
        shared_memory=_free("/dev/shm"), cache=cache, cache_error=cache_error, disk=_free(cache),
        torch=probed.get("torch", ""), torch_error=probed.get("torch_error", ""),
        cuda_build=probed.get("cuda_build", ""),
        gpus=tuple(Gpu(name, memory, (major, minor)) for name, memory, major, minor in gpus),
        driver=driver, driver_cuda=driver_cuda, has_gpu_file=any(file.exists() for file in DRIVERS),
        has_mps=shutil.which(CONTROL, path=environment.get("PATH")) is not None,
        kernels_error=probed.get("kernels_error", ""), compiler=_first_line(["g++", "--version"]),
        missing=[name for name in REQUIRED if not _is_installed(name)],
        missing_optional=[name for name in OPTIONAL if not _is_installed(name)],
        has_embedded=any((EMBEDDED / "model").glob("*.safetensors")),
    )  # fmt: skip


def _probe(environment: Mapping[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, timeout=PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return {"torch_error": f"its import took more than {PROBE_TIMEOUT_S:.0f} s"}
    try:
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        words = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        return {"torch_error": f"its process ended with {done.returncode}: {words}"}
    return told


def _driver(environment: Mapping[str, str]) -> tuple[str, str]:
    """Its version, and the newest version of CUDA that it serves."""
    told = _output(["nvidia-smi"], environment)
    version = re.search(r"Driver Version: ([\d.]+)", told)
    cuda = re.search(r"CUDA Version: ([\d.]+)", told)
    return version[1] if version else "", cuda[1] if cuda else ""


def _cache(environment: Mapping[str, str]) -> tuple[str, str]:
    try:
        home = home_folder(environment)
        if home is None:
            return "", "there is no home folder in which this user may write"
        return str(cache_folder("", environment, home, Path("/"))), ""
    except (OSError, ValueError) as error:
        return "", str(error)


def _free(folder: str) -> int:
    """Bytes on the disk of a folder, which may not be there yet."""
    path = Path(folder or "/")
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):  # of a parent package
        return False


def _first_line(command: Sequence[str]) -> str:
    return _output(command, None).partition("\n")[0]


def _output(command: Sequence[str], environment: Mapping[str, str] | None) -> str:
    try:
        done = subprocess.run(
            command, env=None if environment is None else dict(environment), capture_output=True, text=True,
            timeout=20.0,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
