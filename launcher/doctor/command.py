"""Says in plain words what this machine can do, which models fit, and what is missing.

python -m launcher.doctor            # --json: for programs; --model FOLDER: and about these files

Exit status 0: the embedded model can be served here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.doctor.facts import Facts, gather
from launcher.doctor.findings import Finding, can_serve, findings
from launcher.doctor.fits import Fit, on_cpu, on_gpus
from launcher.doctor.judged_model import TOPIC, judge_model

MARKS = {"good": "ok", "note": "note", "warning": "WARN", "error": "ERROR"}


def examine(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launcher.doctor", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="facts and findings as one JSON object")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a model's files, to be judged as well")
    options = parser.parse_args(arguments)
    facts = gather(environment)
    found = findings(facts)
    if options.model is not None:
        found += judge_model(options.model, facts)
    fits = on_gpus(facts) if facts.gpus else on_cpu(facts)
    sys.stdout.write(as_json(facts, found, fits) if options.json else as_text(facts, found, fits))
    return 0 if can_serve(found) else 1


def as_text(facts: Facts, found: Sequence[Finding], fits: Sequence[Fit]) -> str:
    lines = ["This machine", ""]
    for finding in found:
        lines.append(f"  {MARKS[finding.level]:<6} {finding.topic + ':':<15} {finding.text}")
        if finding.help:
            lines.append(f"{'':25}-> {finding.help}")
    where = "the memory of its GPUs" if facts.gpus else "its memory"
    lines += ["", f"Published models that fit {where}, with the default caches; in GiB", ""]
    kinds = list(fits[0].gib)
    lines.append(f"  {'':<22}" + "".join(f"{kind:>12}" for kind in kinds))
    for fit in fits:
        cells = (f"{fit.gib[kind]:.1f}{' fits' if kind in fit.fits else '   no'}" for kind in kinds)
        lines.append(f"  {fit.model:<22}" + "".join(f"{cell:>12}" for cell in cells))
    lines += ["", _verdict(found), ""]
    return "\n".join(lines)


def _verdict(found: Sequence[Finding]) -> str:
    if can_serve(list(found)):
        return "The embedded model can be served here: python -m launcher"
    topics = ", ".join(dict.fromkeys(finding.topic for finding in found if finding.level == "error"))
    which = "This model" if topics == TOPIC else "The embedded model"
    return f"{which} cannot be served here yet: {topics}."


def as_json(facts: Facts, found: Sequence[Finding], fits: Sequence[Fit]) -> str:
    told: dict[str, Any] = dataclasses.asdict(facts)
    told["flags"] = sorted(facts.flags)
    body = {
        "can_serve": can_serve(list(found)),
        "findings": [finding._asdict() for finding in found],
        "models": [fit._asdict() for fit in fits],
        "facts": told,
    }
    return json.dumps(body, indent=1) + "\n"
