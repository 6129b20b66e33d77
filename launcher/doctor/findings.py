"""What the facts of a machine mean, in plain words. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from launcher.doctor.facts import OPTIONAL, Facts
from launcher.memory import GIB

Level = Literal["good", "note", "warning", "error"]
LEAST_PYTHON = (3, 11)
EMBEDDED_GIB = 2.5  # that the embedded model's workers take, caches included
TIGHT_GIB = 4.0
LEAST_DISK_GIB = 5.0  # of a folder that is to keep a model
LEAST_SHARED_MEMORY = 1 << 30  # for NCCL, between GPUs
WITH_BFLOAT16 = (8, 0)  # compute capability
ADDED_BY = {
    "amx_tile": "AMX",
    "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "avx512f": "AVX512",
}


class Finding(NamedTuple):
    level: Level  # an error: the embedded model cannot be served
    topic: str
    text: str
    help: str = ""  # what can be done


def findings(facts: Facts) -> list[Finding]:
    return [
        *_system(facts), *_cores(facts), *_instructions(facts), *_kernels(facts), *_gpu(facts),
        *_memory(facts), *_disk(facts), *_packages(facts),
    ]  # fmt: skip


def can_serve(found: list[Finding]) -> bool:
    return not any(finding.level == "error" for finding in found)


def _system(facts: Facts) -> Iterator[Finding]:
    version = ".".join(map(str, facts.python))
    what = f"{facts.system} on {facts.machine}, Python {version}"
    if facts.system != "Linux":
        yield Finding("error", "system", f"{what}: the server runs on Linux only", "use a container or WSL 2")
    elif facts.python < LEAST_PYTHON:
        yield Finding("error", "system", what, "install Python 3.11 or later")
    else:
        yield Finding("good", "system", what)
    if not facts.has_embedded:
        yield Finding(
            "error", "system", "the embedded model's files are missing", "install the package again"
        )


def _cores(facts: Facts) -> Iterator[Finding]:
    usable = facts.num_cores
    text = f"{facts.num_cores} cores"
    if facts.quota is not None and facts.quota < facts.num_cores:
        usable = max(1, int(facts.quota))
        text = f"{usable} of {facts.num_cores} cores: the container's CPU quota is {facts.quota:g}"
    if facts.processor:
        text += f", {facts.processor}"
    if usable == 1:
        what = f"{text}: the language model and the vision encoder take turns on the core"
        yield Finding("warning", "cores", what, "give the server two cores or more")
    else:
        yield Finding("good", "cores", text)


def _instructions(facts: Facts) -> Iterator[Finding]:
    if facts.gpus or facts.machine not in ("x86_64", "AMD64"):
        return
    if "avx2" not in facts.flags:
        what = (
            "no AVX2: torch's operators compute, several times slower than the compiled kernels, and "
            "--quantization int4 takes as much memory as int8"
        )
        yield Finding("warning", "instructions", what, "in a virtual machine, pass the host's CPU model on")
        return
    has = [name for flag, name in ADDED_BY.items() if flag in facts.flags]
    if "avx512_bf16" not in facts.flags:
        what = f"{', '.join([*has, 'AVX2'])}, no AVX512-BF16: the model computes in float32"
        yield Finding("note", "instructions", f"{what} (--dtype auto)")
    else:
        yield Finding(
            "good", "instructions", f"{', '.join(has)}: the model computes in bfloat16 (--dtype auto)"
        )


def _kernels(facts: Facts) -> Iterator[Finding]:
    if facts.torch_error or facts.gpus:
        return
    if not facts.kernels_error:
        yield Finding("good", "kernels", "the compiled kernels for CPUs are there")
        return
    why = f"they cannot be loaded: {facts.kernels_error}"
    text = f"without the compiled kernels for CPUs the model is several times slower; {why}"
    if not facts.compiler:
        what = "install g++ 10 or later and Python's headers, then the package again"
    else:
        what = (
            "remove workers/nn/native/_kernels*.so and install the package again with pip -v, which tells "
            f"what the compiler says ({facts.compiler})"
        )
    yield Finding("warning", "kernels", text, what)


def _gpu(facts: Facts) -> Iterator[Finding]:
    if facts.torch_error:
        what = "pip install the version of torch that setup.cfg names"
        yield Finding("error", "torch", f"torch cannot be imported: {facts.torch_error}", what)
        return
    built = f"built for CUDA {facts.cuda_build}" if facts.cuda_build else "a build for CPUs"
    yield Finding("good", "torch", f"torch {facts.torch}, {built}")
    has_driver = bool(facts.driver) or facts.has_gpu_file
    if not facts.gpus:
        yield from _unusable_gpu(facts) if has_driver else [Finding("note", "GPU", "none: the CPU computes")]
        return
    for number, gpu in enumerate(facts.gpus):
        capability = ".".join(map(str, gpu.capability))
        text = f"{number}: {gpu.name}, {gpu.memory / GIB:.0f} GiB, compute capability {capability}"
        has_bfloat16 = gpu.capability >= WITH_BFLOAT16
        yield Finding("good", "GPU", text if has_bfloat16 else f"{text}: float16, as it has no bfloat16")
    if facts.has_mps:
        yield Finding(
            "good", "MPS", "the MPS daemon can be started: vision encoder and model share a GPU at once"
        )
    else:
        what = "nvidia-cuda-mps-control is missing: vision encoder and model take turns on a GPU"
        yield Finding("note", "MPS", what, "it comes with the driver's utilities")
    if len(facts.gpus) > 1 and facts.shared_memory < LEAST_SHARED_MEMORY:
        what = f"/dev/shm has {facts.shared_memory / GIB:.2f} GiB free, NCCL needs about 1 for --tp"
        yield Finding("warning", "shared memory", what, "docker run --shm-size 1g, or --ipc host")


def _unusable_gpu(facts: Facts) -> Iterator[Finding]:
    driver = f"a driver {facts.driver} is there" if facts.driver else "a GPU's driver is there"
    if not facts.cuda_build:
        help = "install torch from PyPI's default for Linux, or from the index that torch's page names"
        yield Finding("warning", "GPU", f"{driver}, but torch is a build for CPUs: the GPU is not used", help)
    elif facts.driver_cuda and _version(facts.driver_cuda) < _version(facts.cuda_build):
        what = f"{driver} and serves CUDA up to {facts.driver_cuda}, torch was built for {facts.cuda_build}"
        yield Finding("warning", "GPU", f"{what}: the GPU is not used", "update the driver")
    else:
        help = "is CUDA_VISIBLE_DEVICES set, or was the container started without --gpus?"
        yield Finding("warning", "GPU", f"{driver}, but torch finds no GPU that it may use", help)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _memory(facts: Facts) -> Iterator[Finding]:
    text = f"{facts.memory / GIB:.1f} GiB, {facts.available / GIB:.1f} available"
    if facts.memory < EMBEDDED_GIB * GIB:
        what = f"{text}: the embedded model's workers take about {EMBEDDED_GIB}"
        yield Finding("error", "memory", what, "give the machine or container more memory")
    elif facts.available < TIGHT_GIB * GIB:
        yield Finding(
            "warning", "memory", f"{text}: workers may be killed for lack of it", "end other programs"
        )
    else:
        yield Finding("good", "memory", text)


def _disk(facts: Facts) -> Iterator[Finding]:
    if facts.cache_error:
        what = f"nothing can be kept: {facts.cache_error}"
        yield Finding(
            "note", "disk", what, "--cache-dir names a folder for exports, HF_HOME one for downloads"
        )
        return
    text = f"{facts.disk / GIB:.0f} GiB free where models and exports are kept ({facts.cache})"
    if facts.disk < LEAST_DISK_GIB * GIB:
        yield Finding("warning", "disk", f"{text}: too little to download a model", "set HF_HOME elsewhere")
    else:
        yield Finding("good", "disk", text)


def _packages(facts: Facts) -> Iterator[Finding]:
    for name in facts.missing:
        yield Finding(
            "error", "packages", f"the package {name} is missing", "install vlm-pipeline again with pip"
        )
    if not facts.missing:
        yield Finding("good", "packages", "all that the server needs are there")
    for name in facts.missing_optional:
        yield Finding("note", "packages", f"without {name}: no {OPTIONAL[name]}")
