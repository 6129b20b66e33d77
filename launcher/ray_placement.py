"""Ray starts the launchers: this process is its driver, and no launcher itself.

    placement group of a bundle a node → an actor on each → say again and again what each is to run
                                                          → at a signal: the head ends in order, then the rest

Ray restarts actors, and places again those whose machine is gone; the pipeline itself needs neither. Tokens
and tensors never pass here.
"""

from __future__ import annotations

import logging
import math
import secrets
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from launcher.node_command import arguments_of, bundle, node_config
from launcher.ray_node import Launch, NodeNews, RayNode
from pipeline.config import Config
from pipeline.process.nodes import HEAD

logger = logging.getLogger(__name__)
INSTALL = "pip install 'vlm-pipeline[ray]'"
WILDCARDS, LOOPBACK = ("", "0.0.0.0", "::"), ("127.0.0.1", "::1", "localhost")
CALL_S = 5.0  # for which an actor waits for news
WAIT_S = 0.5  # for which signals wait
RETRY_S = 1.0  # after a call that has reached no actor
TOLD_S = 10.0  # without room in the cluster, after which that is told
GRACE_S = 15.0  # for a launcher's end, besides the time that open requests get
MAX_CALLS = 8  # of an actor at once
MAX_FAILURES = 5  # starts of the head in a row, in half a minute


class PlacementFailed(ValueError):
    """The pipeline cannot run this way, and why."""


class Stopped(Exception):
    """A signal has come."""


class RayPlacement:
    def __init__(self, config: Config, environment: Mapping[str, str], folder: Path) -> None:
        """`environment`: variables for the head only; empty ones count as absent. `folder`: from which
        relative paths are meant.
        """
        self._config, self._folder = config, folder
        self._environment = {name: value for name, value in environment.items() if value}
        self._ranks = range(config.cluster.nnodes)
        self._token = secrets.token_hex(32) if config.cluster.has_nodes else ""
        self._signalled = threading.Event()
        self._num_signals = 0
        self._ray: Any = None
        self._group: Any = None
        self._actors: dict[int, Any] = {}
        self._news: dict[int, NodeNews] = {}  # of actors that can be reached
        self._head_address = ""  # unknown while no actor has it
        self._url = ""

    def run(self) -> int:
        """Until a signal (0). Raises ValueError where Ray or the head cannot work."""
        self._ray = _import_ray()
        self._connect()
        # After Ray, which has set handlers of its own.
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            self._place()
            self._tend()
        except Stopped:
            pass
        finally:
            try:
                self._end()
            finally:
                for number, handler in previous.items():
                    signal.signal(number, handler)
        return 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        self._signalled.set()

    def _connect(self) -> None:
        try:
            self._ray.init(address="auto", configure_logging=False, log_to_driver=True)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise PlacementFailed(
                f"placement 'ray': no cluster can be reached ({reason}); `ray start --head` starts one, "
                "RAY_ADDRESS names another"
            ) from None

    # Place.

    def _place(self) -> None:
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundles = [bundle(self._config, rank) for rank in self._ranks]
        self._group = placement_group(bundles, strategy="STRICT_SPREAD")
        self._wait_for_room(bundles)
        actor = self._ray.remote(RayNode)
        for rank, needed in enumerate(bundles):
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
            self._actors[rank] = actor.options(
                num_cpus=needed["CPU"], num_gpus=needed.get("GPU", 0), scheduling_strategy=strategy,
                max_restarts=-1, max_concurrency=MAX_CALLS,
            ).remote()  # fmt: skip

    def _wait_for_room(self, bundles: Sequence[Mapping[str, float]]) -> None:
        ready, told_at = self._group.ready(), time.monotonic() + TOLD_S
        while not self._wait([ready]):
            if time.monotonic() > told_at:
                told_at = math.inf
                there = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
                logger.warning(
                    "the cluster has no room yet: %s are needed, each on a node of its own; there are %s",
                    " and ".join(map(_shown, bundles)), " and ".join(map(_shown, there)),
                )  # fmt: skip

    def _wait(self, calls: Sequence[Any], timeout_s: float = WAIT_S) -> list[Any]:
        """Those that are done, one at least, unless the time is over. Raises Stopped after a signal."""
        done: list[Any] = []
        if calls:
            done, _ = self._ray.wait(calls, num_returns=1, timeout=timeout_s)
        else:
            self._signalled.wait(timeout_s)
        if self._num_signals:
            raise Stopped
        return done

    # Tend.

    def _tend(self) -> None:
        calls: dict[Any, int] = {}
        due = dict.fromkeys(self._ranks, 0.0)  # when to call each next
        while True:
            for rank, at in list(due.items()):
                if at <= time.monotonic():
                    del due[rank]
                    launch = self._launch(rank)
                    wait_s = CALL_S if launch is not None else WAIT_S
                    calls[self._actors[rank].keep.remote(launch, wait_s)] = rank
            for call in self._wait(list(calls)):
                rank = calls.pop(call)
                due[rank] = time.monotonic() + self._read(rank, call)

    def _launch(self, rank: int) -> Launch | None:
        """None until it is known where the head is."""
        if not self._head_address:
            return None
        return Launch(
            arguments_of(node_config(self._config, rank, self._head_address)),
            self._token,
            self._environment if rank == HEAD else {},
            str(self._folder),
        )

    def _read(self, rank: int, call: Any) -> float:
        """Reads what an actor answers. Returns the seconds until the next call."""
        from ray.exceptions import RayActorError

        try:
            news = self._ray.get(call)
        except RayActorError as error:
            if error.actor_init_failed:
                raise PlacementFailed(f"placement 'ray': node {rank} cannot start: {error}") from None
            if self._news.pop(rank, None) is not None:
                logger.error("node %d: its actor is gone or cannot be reached; Ray restarts it", rank)
            if rank == HEAD:
                self._head_address = self._url = ""
            return RETRY_S
        self._on_news(rank, self._news.get(rank), news)
        self._news[rank] = news
        return 0.0

    def _on_news(self, rank: int, before: NodeNews | None, news: NodeNews) -> None:
        if before is None or before.pid != news.pid or before.node_id != news.node_id:
            address = self._address_of(news)
            logger.info(
                "node %d is placed on Ray's node %s (%s), its actor is process %d",
                rank, news.node_id, address, news.pid,
            )  # fmt: skip
            if rank == HEAD:
                self._head_address = address
        if news.launcher_pid and (before is None or before.launcher_pid != news.launcher_pid):
            logger.info("node %d: its launcher is process %d", rank, news.launcher_pid)
        if before is not None and news.num_failures > before.num_failures:
            logger.warning("node %d: its launcher has ended, and is started again", rank)
        if rank != HEAD:
            return
        if news.url and news.url != self._url:
            self._announce(news.url)
        self._url = news.url
        if news.num_failures >= MAX_FAILURES:
            raise PlacementFailed(
                f"placement 'ray': the head's launcher has ended {news.num_failures} times before it served; "
                "its lines above say why"
            )

    def _address_of(self, news: NodeNews) -> str:
        return next(
            str(node["NodeManagerAddress"]) for node in self._ray.nodes() if node["NodeID"] == news.node_id
        )

    def _announce(self, url: str) -> None:
        shown = url_at(url, self._config.api.host, self._head_address)
        sys.stdout.write(f"\nServing at {shown}/v1\n\n")
        sys.stdout.flush()
        if self._config.api.host in LOOPBACK:
            logger.warning(
                "only clients on %s itself reach %s: --host names another address", self._head_address, shown
            )

    # End.

    def _end(self) -> None:
        """In order: no launcher is started again, the head ends and with it the pipeline, then the rest. A
        second signal: at once."""
        self._num_signals = max(1, self._num_signals)  # a failure ends all as one signal does
        if self._actors and self._num_signals == 1:
            logger.info("shutting down: open requests are finished first (Ctrl-C again: at once)")
            patience_s = self._config.launcher.shutdown_timeout + GRACE_S
            # An actor that cannot be reached has no launcher, or one that ends with it.
            reached = {rank: self._actors[rank] for rank in self._news}
            self._finish([actor.release.remote() for actor in reached.values()], RETRY_S)
            if (head := reached.pop(HEAD, None)) is not None:
                self._finish([head.stop.remote(patience_s)], patience_s)
            self._finish([actor.stop.remote(patience_s) for actor in reached.values()], patience_s)
        for actor in self._actors.values():
            self._ray.kill(actor)
        if self._group is not None:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(self._group)
        self._ray.shutdown()

    def _finish(self, calls: list[Any], patience_s: float) -> None:
        """Waits for the calls; those to actors that are gone count as done."""
        end = time.monotonic() + patience_s
        while calls and time.monotonic() < end and self._num_signals == 1:
            _, calls = self._ray.wait(calls, num_returns=len(calls), timeout=WAIT_S)


def url_at(url: str, host: str, address: str) -> str:
    """The URL as it is reached from other machines. `host` is the option's: behind every interface's, the
    launcher has named its own loopback."""
    if host not in WILDCARDS:
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{f'[{address}]' if ':' in address else address}:{parts.port}"


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise PlacementFailed(f"placement 'ray' needs the package ray: {INSTALL}") from None
    return ray


def _shown(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
