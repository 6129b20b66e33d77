"""Threads of a team are spread over the cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os
import torch
from pipeline.process.compute_threads import spread_threads

cores = sorted(os.sched_getaffinity(0))
torch.set_num_threads(len(cores))
torch.ones(1 << 20).add_(1)
before = set(os.listdir("/proc/self/task"))
assert spread_threads(cores)
assert os.sched_getaffinity(0) == {cores[0]}
bound = [os.sched_getaffinity(int(thread)) for thread in before]
for core in cores:
    assert bound.count({core}) == 1, (core, bound)
torch.ones(1 << 20).add_(1)
assert set(os.listdir("/proc/self/task")) == before, "the team is the same that computes for torch"
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")
def test_torch_s_threads_have_a_core_each() -> None:
    """In a process of its own: threads cannot be told apart where others run."""
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=120)
