"""Cores that an LLM and a ViT take turns on, as `pipeline/process/core_sharing.py` has it, or cores of their
own.

Where turns are taken, ViTs compute only while the LLM idles or has lent them the cores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tools.simulation.clock import Clock, Event


class Paused(Protocol):
    """A ViT, as its turns see it."""

    @property
    def is_busy(self) -> bool: ...

    def pause(self) -> None: ...

    def go_on(self) -> None: ...


class Turns:
    def __init__(self, clock: Clock, are_taken: bool) -> None:
        self._clock, self.are_taken = clock, are_taken
        self.vits: list[Paused] = []
        self._has_llm = False  # the LLM computes
        self._loan: Event | None = None
        self._behind: Callable[[], None] = lambda: None

    @property
    def is_vits_turn(self) -> bool:
        return not self.are_taken or not self._has_llm

    @property
    def is_awaited(self) -> bool:
        """A ViT waits for a turn."""
        return self.are_taken and any(vit.is_busy for vit in self.vits)

    def begin(self) -> None:
        """A step of the LLM begins."""
        self._has_llm = True
        if self.are_taken:
            for vit in self.vits:
                vit.pause()

    def idle(self) -> None:
        """The LLM has nothing to compute."""
        self._has_llm = False
        if self.are_taken:
            for vit in self.vits:
                vit.go_on()

    def lend(self, seconds: float, behind: Callable[[], None]) -> None:
        """The ViTs compute for so long, or until they have no work; then `behind` is called."""
        self._behind = behind
        self._loan = self._clock.after(seconds, self._end)
        self.idle()

    def on_vit_idle(self) -> None:
        if self._loan is not None and not self.is_awaited:
            self._loan.cancel()
            self._end()

    def _end(self) -> None:
        self._loan = None
        self._behind()
