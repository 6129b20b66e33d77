"""Phases of a worker's start, as its `WorkerStats` name them."""

LOADING = "loading weights"  # counts bytes
WAITING = "waiting for "  # prefix of the phase of a start that waits for another worker
