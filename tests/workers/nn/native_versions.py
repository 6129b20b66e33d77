"""The instruction sets of the compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from workers.nn.native import operators

VERSIONS = operators.kernels.versions() if operators.kernels else ["none"]
ROWS_VERSIONS = (operators.kernels.rows_versions() if operators.kernels else []) or ["none"]


@pytest.fixture(params=VERSIONS)
def each_version(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every one that this processor has, one after the other."""
    if operators.kernels is None:
        pytest.skip("the package was installed without a C++ compiler")
    operators.kernels.use(request.param)
    yield request.param
    operators.kernels.use(VERSIONS[0])


@pytest.fixture(params=ROWS_VERSIONS)
def each_rows_version(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same of the attention of many rows."""
    if ROWS_VERSIONS == ["none"]:
        pytest.skip("no kernel for this processor")
    operators.kernels.use_rows(request.param)
    yield request.param
    operators.kernels.use_rows(ROWS_VERSIONS[0])
