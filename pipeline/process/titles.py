"""What a process is called in `ps` and `top`: "vlm vit.0"."""

from __future__ import annotations

from setproctitle import setproctitle, setthreadtitle

PREFIX = "vlm "
SERVER = "server"  # of which every worker is a fork


def set_title(name: str) -> None:
    setproctitle(PREFIX + name)
    setthreadtitle(name)  # of the 15 characters that `top` shows none is for the prefix


def name_of(command_line: bytes) -> str:
    """From /proc/PID/cmdline. Empty: no process of a pipeline, or one that has just started."""
    title = command_line.partition(b"\0")[0].decode(errors="replace")
    return title.removeprefix(PREFIX) if title.startswith(PREFIX) else ""
