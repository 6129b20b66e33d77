"""Limits of one request: whoever sends or reads one keeps them."""

from __future__ import annotations

# pictures of one request, with those that are frames of a video: each may ride in a frame of its own
MAX_ITEMS = 1024
MAX_MESSAGES = 1024  # of one request
MAX_PARTS = 4096  # of all messages of one request
