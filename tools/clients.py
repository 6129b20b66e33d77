"""Real client programs that are too heavy for the tests, each in a virtual environment of its own, against a
running server.

They are run for compatibility: the numbers that they print are no measurements. `python -m tools.clients
--base-url http://127.0.0.1:8000 lm-eval guidellm aiperf` installs them under `--folder`, runs them on the
embedded model, and prints a line for each run. docs/clients.md has the results so far.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

TIMEOUT_S = 300
MODEL = "embedded-shapes"
TOKENIZER = Path(__file__).parents[1] / "launcher" / "embedded" / "model"
PACKAGES = {"lm-eval": "lm-eval[api]==0.4.13", "guidellm": "guidellm==0.8.1", "aiperf": "aiperf==0.13.0"}
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{q}}}}"
doc_to_target: " {{{{a}}}}"
metric_list: [{{metric: {metric}}}]
"""


class Run(NamedTuple):
    name: str
    command: Sequence[str]


def lm_eval(program: str, url: str, folder: Path) -> Iterator[Run]:
    """A task of its own: none is downloaded."""
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps({"q": f"What is a {of}?", "a": "I"}) + "\n" for of in ("star", "cup")))
    for name, kind, metric in (
        ("written", "generate_until", "exact_match"),
        ("likely", "loglikelihood", "acc"),
    ):
        task = TASK.format(name=name, data=data, kind=kind, metric=metric)
        (folder / f"{name}.yaml").write_text(task)
    common = [program, "run", "--include_path", str(folder)]
    args = f"model={MODEL},num_concurrent=2,base_url={url}/v1"
    chat = ["--model", "local-chat-completions", "--apply_chat_template", "--tasks", "written"]
    yield Run("lm-eval chat", [*common, *chat, "--model_args", f"{args}/chat/completions"])
    text = ["--model", "local-completions", "--tasks", "written,likely"]
    tokenizer = f"tokenizer={TOKENIZER},tokenizer_backend=huggingface"
    yield Run("lm-eval completions", [*common, *text, "--model_args", f"{args}/completions,{tokenizer}"])


def guidellm(program: str, url: str, folder: Path) -> Iterator[Run]:
    common = [
        program, "run", "--disable-progress",
        "--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=3",
        "--tokenizer", f"kind=huggingface_auto,model={TOKENIZER}",
        "--data", "kind=synthetic_text,prompt_tokens=20,output_tokens=8",
        "--output", f"kind=json,path={folder / 'report.json'}",
    ]  # fmt: skip
    for route in ("chat/completions", "completions", "responses"):
        backend = f"kind=openai_http,target={url},model={MODEL},request_format=/v1/{route}"
        yield Run(f"guidellm {route}", [*common, "--backend", backend])


def aiperf(program: str, url: str, folder: Path) -> Iterator[Run]:
    for kind in ("chat", "completions"):
        yield Run(
            f"aiperf {kind}",
            [
                program, "profile", "-m", MODEL, "--url", url, "--endpoint-type", kind, "--streaming",
                "--tokenizer", str(TOKENIZER), "--request-count", "4", "--concurrency", "2",
                "--isl", "20", "--osl", "8", "--ui", "none", "--artifact-dir", str(folder / kind),
            ],
        )  # fmt: skip


CLIENTS = {"lm-eval": (lm_eval, "lm_eval"), "guidellm": (guidellm, "guidellm"), "aiperf": (aiperf, "aiperf")}


def install(name: str, folder: Path) -> Path:
    """The folder of the client's programs."""
    environment = folder / "venv"
    if not environment.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        subprocess.run([str(environment / "bin" / "pip"), "install", "-q", PACKAGES[name]], check=True)
    return environment / "bin"


def run(one: Run, folder: Path) -> bool:
    """What the client prints is kept beside its environment."""
    log = folder / f"{one.name.replace(' ', '-').replace('/', '-')}.log"
    with log.open("w") as file:
        try:
            done = subprocess.run(
                one.command, stdout=file, stderr=subprocess.STDOUT, cwd=folder, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            print(f"{one.name}: not done after {TIMEOUT_S} s, {log}")
            return False
    print(f"{one.name}: {'ok' if done.returncode == 0 else f'exit status {done.returncode}'}, {log}")
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clients", nargs="*", help=f"of {', '.join(CLIENTS)}; all unless given")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--folder", type=Path, default=Path("clients"), help="for environments and logs")
    options = parser.parse_args()
    if unknown := set(options.clients) - set(CLIENTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    is_good = True
    for name in options.clients or CLIENTS:
        folder = (options.folder / name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        runs, program = CLIENTS[name]
        path = shutil.which(program, path=install(name, folder))
        assert path is not None, f"{PACKAGES[name]} has no program {program}"
        for one in runs(path, options.base_url, folder):
            is_good &= run(one, folder)
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
