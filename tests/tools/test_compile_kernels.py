"""Every Triton kernel compiles for GPUs that are not here, and fits them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tools.compile_kernels import SHARED_LIMITS, Usage, variants


@pytest.mark.timeout(600)
def test_no_kernel_spills_or_takes_more_than_there_is() -> None:
    # A process of its own: here kernels are interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tools.compile_kernels", "--json"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    usages = [Usage(**usage) for usage in json.loads(done.stdout)]
    assert [usage for usage in usages if not usage.is_fine] == []
    assert len(usages) == sum(len(list(variants(capability))) for capability in SHARED_LIMITS)
    assert all(usage.registers > 8 for usage in usages), "nothing was compiled"
    assert done.returncode == 0


@pytest.mark.parametrize(
    "usage",
    [Usage("decode", 80, 161, 0, 0), Usage("decode", 90, 90, 8, 0), Usage("merge", 80, 90, 0, 200 << 10)],
)
def test_what_is_too_much(usage: Usage) -> None:
    assert not usage.is_fine
