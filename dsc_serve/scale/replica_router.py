"""The routing policy of `affinity`, as Ray Serve asks for it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from dsc_serve.scale.call import Call
from dsc_serve.scale.placement import Bound, PlacementKey, PrefixMemory, Ring, order


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Sends a `Call` where its prompt's beginning was computed. Each door has one, which counts its own requests."""

    def initialize_state(self, factor: float, slack: int) -> None:
        self._bound = Bound(factor, slack)
        self._memory = PrefixMemory()
        self._ring = Ring(())
        self._loads: Counter[str] = Counter()
        self._assigned: dict[str, str] = {}  # replicas by request

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if not by_name:
            return []
        if self._ring.names != by_name.keys():
            self._ring = Ring(by_name)
        placement = PlacementKey() if pending_request is None else placement_key(pending_request)
        holders = self._memory.holders(placement.chain, by_name)
        loads = {name: self._loads[name] for name in by_name}
        names = order(placement, self._ring, holders, loads, self._bound)
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            self._assign(pending_request, names[0])
        return [[by_name[name]] for name in names]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: object) -> None:
        name = replica_id.unique_id
        self._memory.record(placement_key(pending_request).chain, name)
        if self._assigned.get(pending_request.metadata.internal_request_id, name) != name:
            self._assign(pending_request, name)

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        self._forget(internal_request_id)

    def _assign(self, request: PendingRequest, name: str) -> None:
        """Count the request from its choice on: a burst is chosen for before any of it is sent."""
        request_id = request.metadata.internal_request_id
        self._forget(request_id)
        self._assigned[request_id] = name
        self._loads[name] += 1
        request.future.add_done_callback(lambda future: self._forget(request_id) if future.cancelled() else None)

    def _forget(self, request_id: str) -> None:
        name = self._assigned.pop(request_id, None)
        if name is not None:
            self._loads[name] -= 1
            if not self._loads[name]:
                del self._loads[name]


def placement_key(request: PendingRequest) -> PlacementKey:
    call = next((argument for argument in request.args if isinstance(argument, Call)), None)
    return PlacementKey() if call is None else call.placement
