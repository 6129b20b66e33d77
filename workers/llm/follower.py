"""A rank beside rank 0, without its process: it computes what rank 0 publishes, in the same order."""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

from pipeline.wire.base import PoolClosed, PoolOpened
from pipeline.wire.errors import PipelineError
from pipeline.wire.steps import StepPlan, StepsMessage, TokenMasks
from workers.llm.model_runner import ModelRunner


class Follower:
    """`widen` sets whether a step runs on all cores; `pool_closed` reports a pool that this rank closed."""

    def __init__(
        self,
        runner: ModelRunner,
        widen: Callable[[bool], None],
        pool_closed: Callable[[str, int], None],
    ) -> None:
        self._runner, self._widen, self._pool_closed = runner, widen, pool_closed
        self._last_step = 0

    def handle(self, message: StepsMessage) -> None:
        """Raises PipelineError where a step is missing."""
        match message:
            case PoolOpened():
                self._runner.pools.open(message.pool)
            case PoolClosed():
                self._runner.finish()
                self._runner.pools.close(message.pool_id)
                self._pool_closed(message.pool_id, message.pool_epoch)
            case StepPlan():
                if message.step != self._last_step + 1:
                    raise PipelineError(f"step {message.step} came after step {self._last_step}")
                self._last_step = message.step
                self._widen(message.is_wide)
                self._runner.launch(message)
            case TokenMasks():
                if message.step != self._last_step:
                    raise PipelineError(f"masks of step {message.step} came after step {self._last_step}")
                self._runner.choose(message.masks)
            case _:
                assert_never(message)
