from __future__ import annotations

import msgspec
import pytest

from pipeline.transport.mapping_check import check_mapping
from pipeline.transport.tensors import PATTERN_BYTES, TensorPool
from pipeline.wire.errors import PipelineError


def test_a_pool_is_mapped_by_another_process_before_it_is_announced() -> None:
    pool = TensorPool.on_host("vit.0", 1, 4096, 8)
    check_mapping(pool.info)
    with pytest.raises(
        PipelineError, match=r"cannot be mapped by another process: .*what its owner wrote is not in it"
    ):
        check_mapping(msgspec.structs.replace(pool.info, pattern=b"x" * PATTERN_BYTES))
    pool.close()
