"""Tells shortages of this machine from errors of media and hosts. Only this file decides that.

A shortage is a 503: the client may repeat the request.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator

from pipeline.wire.errors import RequestError

logger = logging.getLogger(__name__)
# Descriptors of this process and of the machine; memory, also for sockets; a disk's space and quota; and the
# number of processes and threads.
SHORTAGES = frozenset(
    (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)
)
NO_THREAD = "can't start new thread"  # as Python says it, in a RuntimeError
NO_ROOM = "the server has no room for this request now"


def is_shortage(error: BaseException) -> bool:
    """True also for aiohttp's OSErrors, which have the errno of their cause."""
    match error:
        case MemoryError():
            return True
        case OSError():
            return error.errno in SHORTAGES
        case RuntimeError():
            return str(error) == NO_THREAD
        case _:
            return False


def no_room(error: BaseException, field: str) -> RequestError:
    logger.warning("no room for a request: %r", error)
    return RequestError(NO_ROOM, field=field, status=503)


def refusal_of(error: BaseException, otherwise: RequestError) -> RequestError:
    """The client's error: `no_room` for a shortage, else `otherwise`."""
    return no_room(error, otherwise.info.field) if is_shortage(error) else otherwise


@contextlib.contextmanager
def own_file(field: str = "") -> Iterator[None]:
    """Encloses work on the server's own file, where every OSError is a shortage: raised as a RequestError."""
    try:
        yield
    except OSError as error:
        raise no_room(error, field) from None
