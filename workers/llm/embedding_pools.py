"""The ViTs' pools as the ranks of a group see them together."""

from __future__ import annotations

import logging

from torch import Tensor

from pipeline.transport.tensors import PoolGoneError, PoolMap
from pipeline.wire.errors import PipelineError
from pipeline.wire.handles import PoolInfo, TensorHandle
from workers.llm.parallel import TensorParallel

logger = logging.getLogger(__name__)


class EmbeddingPools:
    """Each rank reads a pool in place; where some cannot map it, one rank reads and broadcasts the rows."""

    def __init__(self, pools: PoolMap, parallel: TensorParallel) -> None:
        self._pools, self._parallel = pools, parallel
        # By pool id: the epoch, and the rank that reads for all (None: each rank for itself).
        self._opened: dict[str, tuple[int, int | None]] = {}

    def open(self, info: PoolInfo) -> None:
        """To be called on all ranks, in the same order among steps.

        Raises PipelineError when no rank can map the pool.
        """
        error, is_gone = "", False
        try:
            if not self._parallel.maps_pools:
                raise PipelineError("the pool is on another node")
            self._pools.open(info)
        except PoolGoneError as caught:
            error, is_gone = str(caught), True
        except (PipelineError, OSError, ImportError) as caught:  # the other ranks wait in gather_flags
            error = str(caught)
        can_read = self._parallel.gather_flags(not error)
        if is_gone:
            logger.info("%s", error)  # the ViT's successor announces its own pool
            return
        if not any(can_read):
            remedy = "--embedding-transport host needs no mapping"
            raise PipelineError(f"the embeddings of {info.pool_id} cannot be read ({error}); {remedy}")
        self._opened[info.pool_id] = info.epoch, None if all(can_read) else can_read.index(True)
        if error:
            logger.warning(
                "rank %d gets the embeddings of %s from rank %d: %s",
                self._parallel.rank, info.pool_id, can_read.index(True), error,
            )  # fmt: skip

    def close(self, pool_id: str) -> None:
        """The pool's owner has died, and no in-flight step reads the pool."""
        self._opened.pop(pool_id, None)
        self._pools.close(pool_id)

    def knows(self, pool_id: str, epoch: int) -> bool:
        return self._opened.get(pool_id, (-1, None))[0] >= epoch

    def gather(self, out: Tensor, embeddings: TensorHandle, start: int) -> None:
        """Fills contiguous rows of a step's input, in the order of its stream.

        Raises StaleHandleError when the embeddings are no longer there.
        """
        _, reader = self._opened.get(embeddings.pool_id, (-1, None))
        if reader is None or reader == self._parallel.rank:
            self._pools.copy_rows(out, embeddings, start)
        if reader is not None:
            self._parallel.broadcast(out, reader)
