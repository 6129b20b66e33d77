"""The fork server of the workers; only the launcher starts it."""

import sys

from pipeline.process.fork_server import main

main(sys.argv[1:])
