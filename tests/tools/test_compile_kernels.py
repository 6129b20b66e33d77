"""Every Triton kernel compiles for a GPU that is not here, and fits it. All variants for all GPUs are for the
command itself: they take minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tools.compile_kernels import SHARED_LIMITS, Usage, numbers, quick_numbers, variants


@pytest.mark.timeout(400)
def test_no_kernel_spills_or_takes_more_than_there_is() -> None:
    # A process of its own: here kernels are interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tools.compile_kernels", "--quick", "--json"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    usages = [Usage(**usage) for usage in json.loads(done.stdout)]
    assert [usage for usage in usages if not usage.is_fine] == []
    assert len(usages) == len(quick_numbers())
    assert all(usage.registers > 8 for usage in usages), "nothing was compiled"
    assert done.returncode == 0


def test_which_are_compiled_here() -> None:
    """Each kernel, and each kind of weight, once; each GPU."""
    every = {capability: list(variants(capability)) for capability in SHARED_LIMITS}
    quick = [every[capability][number] for capability, number in quick_numbers()]
    assert {variant.kernel for variant in quick} == {variant.kernel for variant in every[80]}
    kinds = {(variant.kernel, variant.constants.get("KIND")) for variant in every[80]}
    assert len(quick) == len(kinds)
    assert len(quick) < 40, "a second of a core each"
    assert {capability for capability, _ in quick_numbers()} == set(SHARED_LIMITS)
    assert set(quick_numbers()) < set(numbers())


@pytest.mark.parametrize(
    "usage",
    [Usage("decode", 80, 161, 0, 0), Usage("decode", 90, 90, 8, 0), Usage("merge", 80, 90, 0, 200 << 10)],
)
def test_what_is_too_much(usage: Usage) -> None:
    assert not usage.is_fine
