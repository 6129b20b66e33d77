"""What a process finds of its machine."""

from __future__ import annotations

from pathlib import Path

from pipeline.process.machine import machine_memory


def test_memory_is_that_of_the_machine_or_the_container(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       16384000 kB\nMemFree: 1 kB\n")
    (tmp_path / "own").write_text("0::/pod/box\n")
    (tmp_path / "pod" / "box").mkdir(parents=True)

    def found() -> int:
        return machine_memory(tmp_path / "meminfo", tmp_path / "own", tmp_path)

    assert found() == 16384000 * 1024
    (tmp_path / "pod" / "box" / "memory.max").write_text("max\n")
    assert found() == 16384000 * 1024
    (tmp_path / "pod" / "memory.max").write_text(f"{2 << 30}\n")
    assert found() == 2 << 30


def test_memory_of_a_container_of_version_1(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       16384000 kB\n")
    (tmp_path / "own").write_text("4:cpu,cpuacct:/\n3:memory:/pod\n")
    (tmp_path / "memory" / "pod").mkdir(parents=True)
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{1 << 62}\n")
    (tmp_path / "memory" / "pod" / "memory.limit_in_bytes").write_text(f"{3 << 30}\n")
    assert machine_memory(tmp_path / "meminfo", tmp_path / "own", tmp_path) == 3 << 30
