"""Options of the launcher, and of all processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.base import at_least, option
from pipeline.config.faults import Fault

LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherConfig:
    run_dir: str = option(
        "",
        "folder for the pipeline's sockets, one launcher each (default: a new private one)",
        metavar="FOLDER",
    )
    gpu_sharing: str = option(
        "auto",
        "how ViT and LLM share a GPU; mps: at once, by a private MPS daemon; timeslice: in turns; auto: mps "
        "where it works",
        choices=("auto", "mps", "timeslice"),
    )
    cpu_sharing: str = option(
        "elastic",
        "LLM and ViTs on a CPU; elastic: each has all cores while the other idles, and they take turns on "
        "fewer than four; split: without turns, for more pictures a second and slower streams; fixed: each "
        "only its own",
        choices=("elastic", "split", "fixed"),
    )
    cache_dir: str = option(
        "",
        "folder for exported and built encoders (default: vlm-pipeline in the user's cache folder)",
        metavar="FOLDER",
    )
    trace_dir: str = option(
        "", "folder in which each worker writes what it does when, for tools/trace.py", metavar="FOLDER"
    )
    otlp_traces_endpoint: str = option(
        "",
        "where the stages of requests are sent as OpenTelemetry's spans, over OTLP/HTTP, as "
        "http://HOST:4318/v1/traces; needs the extra otel, see docs/tracing.md",
        metavar="URL",
    )
    log_level: str = option("info", "least important lines to show", choices=LEVELS)
    shutdown_timeout: float = option(
        10.0, "seconds that open requests get to finish after Ctrl-C", metavar="SECONDS"
    )
    max_attempts: int = option(
        3,
        "a request is given up (503) when so many workers died while it executed there without a new token",
        metavar="N",
    )
    recovery_timeout: float = option(
        60.0,
        "seconds that a request waits for the successor of a worker that died; then 503",
        metavar="SECONDS",
    )
    hang_timeout: float = option(
        120.0,
        "seconds without any progress after which a worker counts as hung and is replaced; 0: never",
        metavar="SECONDS",
    )

    fault: tuple[str, ...] = option(
        (),
        "for tests: what is to go wrong, see pipeline/process/faults.py",
        metavar="ROLE:ACTION:WHAT[:NUMBER]",
    )

    def __post_init__(self) -> None:
        at_least(self, shutdown_timeout=0, max_attempts=1, recovery_timeout=0, hang_timeout=0)
        for text in self.fault:
            Fault.parse(text)
        endpoint = self.otlp_traces_endpoint
        if endpoint and not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_traces_endpoint {endpoint!r} must be a URL of http or https")
        if self.trace_dir and not Path(self.trace_dir).is_dir():
            raise ValueError(f"trace_dir {self.trace_dir!r} is no folder")
