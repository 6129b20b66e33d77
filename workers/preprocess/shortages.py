"""Whose fault an error of the system is: this machine's, which lacks something, or that of what came from
outside.

The only place that decides it. What this machine lacks is a 503: the request may come again.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator

from pipeline.wire.errors import RequestError

logger = logging.getLogger(__name__)
# Descriptors of this process and of the machine; memory, also for sockets; room on a disk, or in a quota of
# it.
SHORTAGES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.EDQUOT))
NO_ROOM = "the server has no room for this request now"


def is_shortage(error: BaseException) -> bool:
    """Of an OSError of aiohttp, too: it has the number of the system's own."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in SHORTAGES)


def no_room(error: BaseException, field: str) -> RequestError:
    logger.warning("no room for a request: %r", error)
    return RequestError(NO_ROOM, field=field, status=503)


def refusal_of(error: BaseException, otherwise: RequestError) -> RequestError:
    """What a client is told of an error: that there is no room, if that is it."""
    return no_room(error, otherwise.info.field) if is_shortage(error) else otherwise


@contextlib.contextmanager
def own_file(field: str = "") -> Iterator[None]:
    """Of a file that the server keeps for itself every OSError is the server's, and raised as a
    RequestError."""
    try:
        yield
    except OSError as error:
        raise no_room(error, field) from None
