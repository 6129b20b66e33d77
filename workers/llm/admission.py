"""Which request is admitted next, and which running request is preempted for it. Pure.

The order of admission: lower `priority` first, then the tenant with the fewest running requests, then the
oldest request. So a tenant with many requests delays its own. A waiting request can be overtaken by priority
eight times, then it goes first: no request starves.

When a tenant below its share waits, a tenant above its share of slots or blocks gives some back: its youngest
request is preempted. The oldest running request is never preempted, so the oldest of all always progresses.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence

from workers.llm.request import Request


def in_line(waiting: Iterable[Request], running: Iterable[Request]) -> Iterator[Request]:
    """The waiting requests, in the order of admission.

    A request to which the caller gives a slot before it takes the next one counts as running from then on.
    """
    num_running = Counter(request.tenant for request in running)
    queues: dict[str, deque[Request]] = {}
    for request in sorted(waiting, key=lambda request: request.order):
        queues.setdefault(request.tenant, deque()).append(request)
    has_priorities = len({request.priority for queue in queues.values() for request in queue}) > 1
    heads: list[tuple[int, int, int, str]] = []

    def push(tenant: str) -> None:
        if queue := queues[tenant]:
            rank, arrival = queue[0].order
            heapq.heappush(heads, (rank, num_running[tenant], arrival, tenant))

    for tenant in queues:
        push(tenant)
    while heads:
        tenant = heapq.heappop(heads)[-1]
        request = queues[tenant].popleft()
        yield request
        if request.slot >= 0:
            num_running[tenant] += 1
            for overtaken in _overtaken_too_often(request, queues, num_running) if has_priorities else ():
                queue = queues[overtaken.tenant]
                queue.remove(overtaken)
                queue.appendleft(overtaken)
                heads = [head for head in heads if head[-1] != overtaken.tenant]
                heapq.heapify(heads)
                if overtaken.tenant != tenant:
                    push(overtaken.tenant)
        push(tenant)


def _overtaken_too_often(
    request: Request,
    queues: dict[str, deque[Request]],
    num_running: Counter[str],
) -> list[Request]:
    """Counts the requests that the just admitted one overtook. Returns those that are to go first now.

    Without priorities one request would be next of all, and one of the admitted request's tenant: only these
    two count. If all did, a long queue would soon go before every priority.
    """
    left = [other for queue in queues.values() for other in queue if not other.is_held]
    next_of_all = min(left, key=lambda other: (num_running[other.tenant], other.arrival), default=None)
    next_of_tenant = min(queues[request.tenant], key=lambda other: other.arrival, default=None)
    overtaken: list[Request] = []
    for other in (next_of_all, None if next_of_tenant is next_of_all else next_of_tenant):
        if other is not None and other.priority > request.priority and not other.is_aged:
            other.num_overtaken += 1
            if other.is_aged:
                overtaken.append(other)
    return overtaken


def whom_to_preempt(running: Sequence[Request]) -> Request:
    """The victim when blocks run out: the last request of the tenant with the most tokens, but not the first
    of all. `running` is in order.
    """
    num_tokens: Counter[str] = Counter()
    for request in running:
        num_tokens[request.tenant] += request.num_tokens
    return max(running[1:] or running, key=lambda request: (num_tokens[request.tenant], request.order))


def who_makes_room(
    newcomer: Request,
    running: Sequence[Request],
    tenants: int,
    max_num_seqs: int,
) -> Request | None:
    """The victim when all slots are taken and the newcomer's tenant is below its share. None: no victim."""
    share = max(1, max_num_seqs // tenants)
    num_running = Counter(request.tenant for request in running)
    if num_running[newcomer.tenant] >= share:
        return None
    return _last_of_heaviest(num_running, share, running)


def who_gives_blocks(
    newcomer: Request,
    num_blocks: int,
    running: Sequence[Request],
    tenants: int,
    num_blocks_of_all: int,
) -> Request | None:
    """The victim when the newcomer lacks blocks and its tenant, with `num_blocks` more, stays within its
    share. None: no victim.
    """
    share = num_blocks_of_all // tenants
    held: Counter[str] = Counter()
    for request in running:
        held[request.tenant] += len(request.block_table)
    if held[newcomer.tenant] + num_blocks > share:
        return None
    return _last_of_heaviest(held, share, running)


def _last_of_heaviest(amounts: Counter[str], share: int, running: Sequence[Request]) -> Request | None:
    above = [request for request in running[1:] if amounts[request.tenant] > share]
    return max(above, key=lambda request: (amounts[request.tenant], request.order), default=None)
