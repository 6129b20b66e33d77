"""The API keys of the endpoint: read from a file and the environment, and hidden from `ps`."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.config import ApiConfig, ApiKey

logger = logging.getLogger(__name__)
VARIABLE = "VLM_API_KEY"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Fields of /proc/self/stat, counted from 0: the addresses at which arguments and environment begin and end.
ARGUMENTS, ENVIRONMENT = slice(45, 47), slice(47, 49)


def with_keys(config: ApiConfig, variable: str) -> ApiConfig:
    """Adds the keys of the file, and those of the environment variable's value.

    Raises ValueError, which shows no key, for a malformed one, and OSError for a file that cannot be read.
    A file without a key is an error: the server would be open to all.
    """
    found = list(_from_variable(variable)) if variable.strip() else []
    # The example may use the variable as it is only if that is one key without a name.
    is_one_key = [key.key for key in found] == [variable.strip()]
    if config.api_key_file:
        found += _from_file(Path(config.api_key_file))
    return dataclasses.replace(
        config, named_keys=tuple(dict.fromkeys(found)), key_is_in_environment=is_one_key
    )


def _from_file(path: Path) -> list[ApiKey]:
    if stat.S_ISREG(mode := path.stat().st_mode) and mode & stat.S_IROTH:
        logger.warning("everybody on this machine may read the keys in %s", path)
    found = []
    # utf-8-sig: some editors write a byte order mark
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1):
        if (text := line.strip()) and not text.startswith("#"):
            name, colon, key = text.partition(":")
            if not colon:
                raise ValueError(f"api_key_file: line {number} of {path} is not NAME:KEY")
            found.append(_named(name, key, f"api_key_file: line {number} of {path}"))
    if not found:
        raise ValueError(f"api_key_file: there is no key in {path}")
    return found


def _from_variable(value: str) -> Iterable[ApiKey]:
    entries = [entry for text in re.split(r"[,\n]", value) if (entry := text.strip())]
    if not entries:
        raise ValueError(f"there is no key in {VARIABLE}")
    for number, entry in enumerate(entries, 1):
        name, colon, key = entry.partition(":")
        yield _named(name, key, f"{VARIABLE}: key {number}") if colon else ApiKey.unnamed(entry)


def _named(name: str, key: str, place: str) -> ApiKey:
    if not NAME.fullmatch(name.strip()):
        raise ValueError(f"{place}: a name has 1 to 64 letters, digits, dots, hyphens or underscores")
    return ApiKey(name.strip(), key.strip())


def hide(secrets: Sequence[str]) -> None:
    """Overwrites secrets in this process's arguments, and VARIABLE in its environment, as `ps` shows them.

    `ps` reads the memory where the kernel put both at the start. If they are not found there, this only
    warns.
    """
    numbers = [int(field) for field in Path("/proc/self/stat").read_text().rpartition(")")[2].split()[1:]]
    # The first field behind the name is a letter and is left out: hence `- 1`.
    for place, shown in ((ARGUMENTS, "cmdline"), (ENVIRONMENT, "environ")):
        start, end = numbers[place.start - 1 : place.stop - 1]
        data = Path(f"/proc/self/{shown}").read_bytes()
        if not start or ctypes.string_at(start, end - start) != data:
            if secrets:
                logger.warning("the arguments of this process cannot be overwritten: others may see its keys")
            continue
        hidden = _hidden(data, [secret.encode("utf-8", "surrogateescape") for secret in secrets])
        ctypes.memmove(start, hidden, len(hidden))


def _hidden(data: bytes, secrets: Sequence[bytes]) -> bytes:
    """The data with asterisks for secrets that are a whole argument or a value behind `=`; same length."""
    entries = []
    for entry in data.split(b"\0"):
        name, equals, value = entry.partition(b"=")
        if entry in secrets:
            entries.append(b"*" * len(entry))
        elif equals and (value in secrets or name == VARIABLE.encode()):
            entries.append(name + equals + b"*" * len(value))
        else:
            entries.append(entry)
    return b"\0".join(entries)
