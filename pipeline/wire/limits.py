"""Limits of one request, checked by its sender and by its reader."""

from __future__ import annotations

# Pictures of one request, frames of a video included: each may be sent in a message frame of its own.
MAX_ITEMS = 1024
MAX_MESSAGES = 1024  # of one request
MAX_PARTS = 4096  # of all messages of one request
MAX_TOOLS = 1024  # functions of one request
MAX_TOOL_CALLS = 4096  # of all messages of one request
