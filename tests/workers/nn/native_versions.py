"""The instruction sets of the compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from workers.nn.native import operators

VERSIONS = operators.kernels.versions() if operators.kernels else ["none"]


@pytest.fixture(params=VERSIONS)
def each_version(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every one that this processor has, one after the other."""
    if operators.kernels is None:
        pytest.skip("the package was installed without a C++ compiler")
    operators.kernels.use(request.param)
    yield request.param
    operators.kernels.use(VERSIONS[0])
