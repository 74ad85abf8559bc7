"""Choices of one prompt: the first computes it, and all of them draw their first token from its last logits.

The others stand outside the queue until then. Each goes on by itself afterwards: it shares the prompt's full blocks and
copies the one that holds its end, whose name is the family's own. Where that has been evicted it computes the end anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsc_serve.engine.kv_cache import BlockPool, block_hash
from dsc_serve.engine.request import Request, SharedPrompt


class Families:
    """The requests that wait for another one's prompt."""

    def __init__(self) -> None:
        self._attached: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._attached)

    def get(self, request_id: str) -> Request | None:
        return self._attached.get(request_id)

    def add(self, leader: Request, private: bool) -> None:
        """Let a new request's siblings wait for it. private: nobody else may find what it computes."""
        if leader.siblings:
            shared = SharedPrompt(1 + len(leader.siblings), list(leader.block_hashes) if private else [], private)
            for one in (leader, *leader.siblings):
                one.shared = shared
        self._attach(leader)

    def part(self, leader: Request, pool: BlockPool, block_size: int) -> Sequence[Request]:
        """The siblings of a request that has computed its prompt, on their own from now on."""
        shared, siblings = leader.shared, leader.siblings
        leader.siblings = ()
        if shared is None:
            return ()
        assert leader.hash_seed is not None
        full, size = leader.prompt_size // block_size, leader.prompt_size
        if siblings and size % block_size:
            parent = leader.block_hashes[full - 1] if full else leader.hash_seed
            # No token is negative: no full block has such a hash.
            shared.tail = block_hash(parent + leader.id.encode(), [-1, *leader.tokens[full * block_size : size]])
            shared.block_hashes.append(shared.tail)
            for group, row in enumerate(leader.rows):
                pool.publish(row[full], shared.tail, group)
        for sibling in siblings:
            sibling.leader = None
            del self._attached[sibling.id]
        self.want_no_more(leader, pool)
        return siblings

    def leave(self, request: Request, pool: BlockPool) -> Request | None:
        """Forget a request that ends; returns the one that leads its siblings from now on, if there are any."""
        self.want_no_more(request, pool)
        if request.leader is not None:
            request.leader.siblings = [one for one in request.leader.siblings if one is not request]
            request.leader = None
            del self._attached[request.id]
        if not request.siblings:
            return None
        heir, *heir.siblings = request.siblings
        request.siblings = ()
        heir.leader = None
        del self._attached[heir.id]
        self._attach(heir)
        return heir

    def want_no_more(self, request: Request, pool: BlockPool) -> None:
        """A request has what it shares of its prompt, or needs nothing any more: the last one takes the hashes away."""
        shared, request.shared = request.shared, None
        if shared is None:
            return
        if shared.private:
            request.hash_seed = None  # what it computes from here on is its own
        shared.waiting -= 1
        if not shared.waiting:
            for digest in reversed(shared.block_hashes):
                pool.withdraw(digest)

    def _attach(self, leader: Request) -> None:
        for sibling in leader.siblings:
            sibling.leader = leader
            self._attached[sibling.id] = sibling
