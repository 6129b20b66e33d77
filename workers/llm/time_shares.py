"""Tenants share the time of the steps, where a step with everybody takes much longer than one of those who
had less. Pure.

Each token of a step counts as its share of the step's seconds. Who has had less time than others gets steps
without them until it has caught up, if such steps are much shorter: on a CPU a step of 64 streams takes ten
times as long as a step of one. Where streams cost nearly nothing beside each other, as on a GPU, all go
together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

# of a tenant's step by others': if they stretch it more, it goes without them when it is behind
MAX_STRETCH = 2.0


class TimeShares:
    def __init__(self) -> None:
        self._used: dict[str, float] = {}  # seconds, of tenants that have work

    def choose(self, num_tokens: Mapping[str, int], seconds_of: Callable[[int], float]) -> set[str]:
        """The tenants whose tokens go into the next step, of those that have so many each. `seconds_of`
        predicts a step of so many tokens.

        Who has work anew counts as having had as much as whoever has had least.
        """
        least = min((self._used[tenant] for tenant in num_tokens if tenant in self._used), default=0.0)
        self._used = {tenant: self._used.get(tenant, least) - least for tenant in num_tokens}
        tenants = sorted(num_tokens, key=lambda tenant: self._used[tenant])
        allowed = seconds_of(sum(num_tokens.values())) / MAX_STRETCH
        chosen, count = set(tenants), 0
        for index, tenant in enumerate(tenants[:-1]):
            count += num_tokens[tenant]
            is_behind = self._used[tenant] < self._used[tenants[index + 1]]
            if is_behind and seconds_of(count) < allowed:
                chosen = set(tenants[: index + 1])
        return chosen

    def charge(self, num_tokens: Counter[str], seconds: float) -> None:
        """A step was made of so many tokens of each tenant."""
        total = num_tokens.total()
        for tenant, count in num_tokens.items():
            self._used[tenant] = self._used.get(tenant, 0.0) + seconds * count / total
