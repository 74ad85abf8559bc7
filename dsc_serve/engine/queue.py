"""The queue: waiting requests in lanes, first come first served within each, and the accounts of tenants."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator

from dsc_serve.engine.request import Request
from dsc_serve.scheduling_params import SchedulingParams

MAX_DEPARTED = 1024


class WaitingQueue:
    """Waiting requests by lane, in order of arrival, and the lanes in order of rank: lowest first, then oldest.

    lane: which lane a request waits in. rank: a lane's rank, looked up when it comes into being and at `rerank`.
    """

    def __init__(self, lane: Callable[[SchedulingParams], Hashable], rank: Callable[[Hashable], float]) -> None:
        self._lane, self._rank = lane, rank
        self._lanes: dict[Hashable, OrderedDict[str, Request]] = {}
        self._keys: dict[str, Hashable] = {}
        self._sort_keys: dict[Hashable, tuple[float, int]] = {}
        self._order: list[tuple[float, int, Hashable]] = []
        self._created = 0

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        return (request.id for request in self.requests())

    def __getitem__(self, request_id: str) -> Request:
        return self._lanes[self._keys[request_id]][request_id]

    def get(self, request_id: str) -> Request | None:
        return self[request_id] if request_id in self._keys else None

    def requests(self) -> Iterator[Request]:
        for _, _, key in self._order:
            yield from self._lanes[key].values()

    def lanes(self) -> Iterator[tuple[float, Iterator[Request]]]:
        """Rank and requests of each lane."""
        for rank, _, key in self._order:
            yield rank, iter(self._lanes[key].values())

    def ahead_of(self, request_id: str) -> Iterator[Request]:
        """Those of the same lane that came before it."""
        for request in self._lanes[self._keys[request_id]].values():
            if request.id == request_id:
                return
            yield request

    def push(self, request: Request, front: bool = False) -> None:
        key = self._lane(request.scheduling)
        self._keys[request.id] = key
        if key not in self._lanes:
            self._lanes[key] = OrderedDict()
            self._created += 1
            self._sort_keys[key] = self._rank(key), self._created
            insort(self._order, (*self._sort_keys[key], key))
        self._lanes[key][request.id] = request
        if front:
            self._lanes[key].move_to_end(request.id, last=False)

    def replace(self, request: Request, heir: Request) -> None:
        """Let another request of the same lane wait in the place of one."""
        key = self._keys.pop(request.id)
        self._keys[heir.id] = key
        lane = [heir if one is request else one for one in self._lanes[key].values()]
        self._lanes[key] = OrderedDict((one.id, one) for one in lane)

    def pop(self, request_id: str) -> Request | None:
        if request_id not in self._keys:
            return None
        key = self._keys.pop(request_id)
        request = self._lanes[key].pop(request_id)
        if not self._lanes[key]:
            del self._lanes[key]
            self._displace(key)
        return request

    def rerank(self, scheduling: SchedulingParams) -> None:
        """Put the lane of a request with these where its rank now says."""
        key = self._lane(scheduling)
        if key in self._sort_keys and self._sort_keys[key][0] != self._rank(key):
            _, created = self._displace(key)
            self._sort_keys[key] = self._rank(key), created
            insort(self._order, (*self._sort_keys[key], key))

    def _displace(self, key: Hashable) -> tuple[float, int]:
        sort_key = self._sort_keys.pop(key)
        del self._order[bisect_left(self._order, sort_key, key=lambda entry: entry[:2])]
        return sort_key


class Accounts:
    """What each tenant has been charged, in tokens per unit of its weight: its level.

    A tenant that comes (back) starts at its old level, but no lower than the level at which work was last taken up, so
    that nobody saves up a claim by staying away and nobody sheds a debt by leaving.
    """

    def __init__(self) -> None:
        self._levels: dict[str, float] = {}
        self._present: dict[str, int] = {}
        self._departed: OrderedDict[str, float] = OrderedDict()
        self._floor = 0.0

    def level(self, tenant: str) -> float:
        return self._levels[tenant]

    def enter(self, request: Request) -> None:
        tenant = request.scheduling.tenant
        if tenant not in self._present:
            self._levels[tenant] = max(self._departed.pop(tenant, 0.0), self._floor)
        self._present[tenant] = self._present.get(tenant, 0) + 1

    def charge(self, request: Request) -> None:
        """Charge an admitted request in advance, once."""
        self._floor = max(self._floor, self._levels[request.scheduling.tenant])
        self._add(request, request.claim)

    def leave(self, request: Request) -> None:
        """Settle a request that has ended: it is charged for what it took, not for what was expected."""
        tenant = request.scheduling.tenant
        if request.charged:
            self._add(request, request.num_tokens - (request.cached_tokens or 0) - request.charged)
        self._present[tenant] -= 1
        if self._present[tenant] == 0:
            del self._present[tenant]
            level = self._levels.pop(tenant)
            if not self._present:
                self._departed.clear()
                self._floor = 0.0
            elif level > self._floor:
                self._departed[tenant] = level
                if len(self._departed) > MAX_DEPARTED:
                    self._departed.popitem(last=False)

    def _add(self, request: Request, tokens: int) -> None:
        request.charged += tokens
        self._levels[request.scheduling.tenant] += tokens / request.scheduling.weight
