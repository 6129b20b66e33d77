"""What the workers count, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.wire.messages import WorkerState

PREFIX = "vlm_"


def exposition(workers: Iterable[WorkerState]) -> str:
    """One family a count, one sample a worker. A worker that was replaced counts from zero again."""
    families: dict[str, list[str]] = {}
    for state in workers:
        values = {
            "worker_ready": int(state.is_ready),
            "worker_restarts": state.epoch - 1,
            "open_requests": state.num_open_requests,
            **state.counters,
        }
        for name, value in values.items():
            families.setdefault(name, []).append(f'{PREFIX}{name}{{worker="{state.worker}"}} {value}')
    return "".join(
        f"# TYPE {PREFIX}{name} gauge\n" + "".join(f"{line}\n" for line in lines)
        for name, lines in families.items()
    )
