"""Divides step time among tenants, where a step with all tenants takes much longer than a step with those
that have had less. Pure.

Each tenant is charged its share of a step's seconds, by tokens. A tenant that has had less time than others
gets steps without them until it has caught up, if such steps are much shorter: on a CPU a step of 64 streams
takes ten times as long as a step of one. Where further streams cost nearly nothing, as on a GPU, all tenants
share every step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

# If other tenants' tokens stretch the step of a tenant that is behind by more, it runs without them.
MAX_STRETCH = 2.0


class TimeShares:
    def __init__(self) -> None:
        self._used: dict[str, float] = {}  # seconds, by tenant that has work

    def choose(self, num_tokens: Mapping[str, int], seconds_of: Callable[[int], float]) -> set[str]:
        """The tenants whose tokens go into the next step. `num_tokens`: ready tokens by tenant; `seconds_of`
        predicts the seconds of a step from its tokens.

        A tenant that has work again starts at the least time that another tenant has had.
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
        """Charges a step's seconds to tenants. `num_tokens`: the step's tokens by tenant."""
        total = num_tokens.total()
        for tenant, count in num_tokens.items():
            self._used[tenant] = self._used.get(tenant, 0.0) + seconds * count / total
