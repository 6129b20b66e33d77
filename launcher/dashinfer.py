"""The command `dashinfer_vlm_serve`: DashInfer-VLM's options, told to this server's command line.

    dashinfer_vlm_serve --model FOLDER --port 8000 --vision_engine tensorrt

An option that means the same here is translated. One without an equivalent is refused by its name, with what
comes nearest. Options of this server may stand beside DashInfer's: `--allowed-local-media-path`, say, without
which no request may name a file. DashInfer-VLM lets requests read any file of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence

from launcher.api_keys import hide
from launcher.cli import main as serve

# The name under which DashInfer's clients ask for the model, and which its answers have.
NAME = "model"
ENGINES = {"tensorrt": "tensorrt", "transformers": "torch"}
# Its --quant-type: ours, or why there is none.
QUANTIZATIONS = {"a8w8": "int8"}
OF_THE_FILES = "files in GPTQ say it themselves: leave the option out"
NO_QUANTIZATION = {
    "gptq": OF_THE_FILES,
    "gptq_weight_only": OF_THE_FILES,
    "a16w4": "activations stay in 16 bits there; the nearest is --quantization int4, where they have 8",
    "a16w8": "activations stay in 16 bits there; the nearest is a8w8",
    "fp8": "activations stay in 16 bits here; the nearest is --quantization fp8",
}
KEY_FILE, CERTIFICATE = "SSL_KEYFILE", "SSL_CERTFILE"
# Its clients ask for this host unless told otherwise. No page of a browser gains by that: it is no name.
CLIENTS_HOST = "0.0.0.0"
LOOPBACK = (None, "localhost", "127.0.0.1", "::1")
# Options whose names and values are those of this server.
SAME = ("host", "port", "device", "dtype", "min_pixels", "max_pixels")
RENAMED = {"max_length": "max-model-len", "max_batch": "max-num-seqs", "parallel_size": "tp"}


class _Refused(Exception):
    """An option without an equivalent; the message names it."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dashinfer_vlm_serve",
        description="Serves a Qwen-VL model with DashInfer-VLM's options. Options of `python -m launcher` "
        "may stand beside them.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="folder, or name on ModelScope")
    for name in (*SAME, *RENAMED, "quant_type", "vision_engine", "api_keys"):
        dashed = f"--{name.replace('_', '-')}"
        parser.add_argument(*dict.fromkeys((f"--{name}", dashed)), dest=name)
    parser.add_argument(
        "--ssl", action="store_true", help=f"files: the variables {KEY_FILE} and {CERTIFICATE}"
    )
    parser.add_argument("--enable-prefix-cache", action="store_true", help="it is on here without the option")
    parser.add_argument("--allow-credentials", action="store_true", help="refused")
    for name in ("origins", "methods", "headers"):
        parser.add_argument(f"--allowed-{name}", type=_json_list, help="a JSON list")
    return parser


def _json_list(text: str) -> list[str]:
    found = json.loads(text)
    if not isinstance(found, list) or not all(isinstance(part, str) for part in found):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON list of texts")
    return found


def translate(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """This server's arguments. Exits with a message that names an option without an equivalent."""
    parser = build_parser()
    given, ours = parser.parse_known_args(arguments)
    if given.api_keys:
        hide([given.api_keys])  # the list: each key is hidden by the server's own command line
    try:
        return [*_model(given.model, ours), *_options(given), *_access(given, ours, environment), *ours]
    except _Refused as refusal:
        parser.error(str(refusal))


def _model(model: str, ours: Sequence[str]) -> list[str]:
    names = [] if "--served-model-name" in ours else ["--served-model-name", NAME, model]
    source = [] if "--download-from" in ours or os.path.isdir(model) else ["--download-from", "modelscope"]
    return ["--model", model, *names, *source]


def _options(given: argparse.Namespace) -> list[str]:
    found = [
        f"--{name.replace('_', '-')}={value}" for name in SAME if (value := getattr(given, name)) is not None
    ]
    found += [
        f"--{ours}={value}" for name, ours in RENAMED.items() if (value := getattr(given, name)) is not None
    ]
    if (engine := given.vision_engine) is not None:
        if engine not in ENGINES:
            raise _Refused(f"--vision_engine must be one of {', '.join(ENGINES)}, got {engine!r}")
        found.append(f"--vit-engine={ENGINES[engine]}")
    if (kind := given.quant_type) is not None:
        if kind not in QUANTIZATIONS:
            why = NO_QUANTIZATION.get(
                kind, f"DashInfer-VLM has {', '.join((*QUANTIZATIONS, *NO_QUANTIZATION))}"
            )
            raise _Refused(f"--quant-type {kind} has no equivalent: {why}")
        found.append(f"--quantization={QUANTIZATIONS[kind]}")
    return [*found, *(["--prefix-caching"] if given.enable_prefix_cache else [])]


def _access(given: argparse.Namespace, ours: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Who may call, and how: keys, TLS, pages of other origins."""
    found = (
        ["--allowed-hosts", CLIENTS_HOST] if given.host in LOOPBACK and "--allowed-hosts" not in ours else []
    )
    if given.allow_credentials:
        raise _Refused("--allow-credentials has no equivalent: browsers' cookies are never allowed")
    for name in ("methods", "headers"):
        if getattr(given, f"allowed_{name}") not in (None, ["*"]):
            raise _Refused(f"--allowed-{name} has no equivalent: those that the routes need are allowed")
    if given.allowed_origins:
        found += ["--allowed-origins", *map(str, given.allowed_origins)]
    if given.api_keys is not None:
        keys = [key for key in given.api_keys.split(",") if key]
        if not keys:  # a shell's variable that is not set: the server would be open
            raise _Refused("--api_keys has no key: leave the option out to serve without keys")
        found += ["--api-key", *keys]
    if given.ssl:
        files = {"--ssl-keyfile": KEY_FILE, "--ssl-certfile": CERTIFICATE}
        for option, variable in files.items():
            if not environment.get(variable):
                raise _Refused(f"--ssl needs the variable {variable}")
            found.append(f"{option}={environment[variable]}")
    return found


def main() -> int:
    return serve(translate(sys.argv[1:], os.environ))


if __name__ == "__main__":
    sys.exit(main())
