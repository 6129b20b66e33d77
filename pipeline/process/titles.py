"""The name of a process in `ps` and `top`: "vlm vit.0"."""

from __future__ import annotations

from setproctitle import setproctitle, setthreadtitle

PREFIX = "vlm "
SERVER = "server"  # the fork server


def set_title(name: str) -> None:
    setproctitle(PREFIX + name)
    setthreadtitle(name)  # without the prefix: `top` shows 15 characters


def name_of(command_line: bytes) -> str:
    """The name in /proc/PID/cmdline. Empty: no process of a pipeline, or one that has just started."""
    title = command_line.partition(b"\0")[0].decode(errors="replace")
    return title.removeprefix(PREFIX) if title.startswith(PREFIX) else ""
