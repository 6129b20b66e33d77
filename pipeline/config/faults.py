"""How a fault is written: `ROLE:ACTION:WHAT[:NUMBER]`; what each does stands in
`pipeline/process/faults.py`."""

from __future__ import annotations

import msgspec

AT_EXECUTION = ("kill", "stop", "fail", "delay")
AT_SENDING = ("drop", "corrupt")
ALWAYS = 1e9


class Fault(msgspec.Struct, frozen=True):
    role: str
    action: str
    what: str
    number: float

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Raises ValueError for what is none."""
        role, _, rest = text.partition(":")
        action, _, rest = rest.partition(":")
        what, _, number = rest.partition(":")
        if action not in (*AT_EXECUTION, *AT_SENDING, "slow", "fill", "end") or not what:
            raise ValueError(f"fault {text!r} is not ROLE:ACTION:WHAT[:NUMBER]")
        return cls(role, action, what, float(number) if number else ALWAYS)
