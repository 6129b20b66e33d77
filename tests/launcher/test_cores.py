"""Quotas of CPU time, as control groups of both versions tell them."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cores import cpu_quota, usable_cores


class Groups:
    """Files like those of a kernel."""

    def __init__(self, folder: Path) -> None:
        self.process, self.mount = folder / "self", folder / "mount"

    def is_in(self, *lines: str) -> None:
        self.process.write_text("".join(f"{line}\n" for line in lines))

    def limit(self, folder: str, **files: str) -> None:
        path = self.mount / folder.lstrip("/")
        path.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (path / name.replace("__", ".")).write_text(text)

    @property
    def quota(self) -> float | None:
        return cpu_quota(self.process, self.mount)

    def cores(self, count: int) -> list[int]:
        return usable_cores(range(10, 10 + count), self.process, self.mount)


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


def test_without_groups_or_a_limit_all_cores_are_used(groups: Groups) -> None:
    assert groups.cores(4) == [10, 11, 12, 13]
    groups.is_in("0::/a/b")
    groups.limit("a/b", cpu__max="max 100000\n")
    assert groups.quota is None
    assert groups.cores(4) == [10, 11, 12, 13]


@pytest.mark.parametrize(
    ("text", "num_cores"),
    [("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 8)],
)
def test_a_quota_of_version_2(groups: Groups, text: str, num_cores: int) -> None:
    groups.is_in("0::/")
    groups.limit("", cpu__max=f"{text}\n")
    cores = groups.cores(8)
    assert len(cores) == num_cores
    assert cores == list(range(cores[0], cores[0] + num_cores))
    assert set(cores) <= set(range(10, 18))


def test_the_least_of_all_groups_above_counts(groups: Groups) -> None:
    groups.is_in("0::/pod/container/mine")
    groups.limit("pod", cpu__max="300000 100000")
    groups.limit("pod/container", cpu__max="max 100000")
    groups.limit("pod/container/mine", cpu__max="500000 100000")
    groups.limit("other", cpu__max="100000 100000")
    assert groups.quota == 3


@pytest.mark.parametrize("folder", ["cpu,cpuacct/box", "cpu/box", "cpu"])
def test_a_quota_of_version_1(groups: Groups, folder: str) -> None:
    """In a container the path may be the host's, which is not there: the mount itself is the group."""
    groups.is_in("5:memory:/box", "4:cpu,cpuacct:/box", "3:cpuset:/box", "0::/box")
    groups.limit(folder, cpu__cfs_quota_us="150000\n", cpu__cfs_period_us="50000\n")
    assert groups.quota == 3
    assert len(groups.cores(2)) == 2


def test_no_limit_of_version_1_and_files_that_say_nothing(groups: Groups) -> None:
    groups.is_in("1:cpu:/", "nonsense", "", "0::/../..")
    groups.limit("cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    groups.limit("", cpu__max="")
    assert groups.quota is None
    groups.limit("", cpu__max="100000 0")
    assert groups.quota is None


def test_containers_with_the_same_quota_do_not_all_take_the_same_cores(groups: Groups) -> None:
    groups.is_in("0::/")
    groups.limit("", cpu__max="100000 100000")
    assert len({tuple(groups.cores(64)) for _ in range(50)}) > 10
