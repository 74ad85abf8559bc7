"""Where requests go: like to like, within the bound; pure functions, so no Ray."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsc_serve.scale.call import placement_key
from dsc_serve.scale.placement import (
    LINK_BYTES,
    MAX_LINKS,
    POINTS,
    Bound,
    PlacementKey,
    PrefixMemory,
    Ring,
    chain_of,
    order,
)

NAMES = [f"replica-{i}" for i in range(10)]
IDLE = dict.fromkeys(NAMES, 0)
BOUND = Bound(factor=1.25, slack=8)


def asked(tenant: str = "", prompt: str = "") -> PlacementKey:
    return placement_key(tenant, json.dumps({"prompt": prompt}).encode())


@given(st.binary(max_size=4 * LINK_BYTES), st.binary(max_size=2 * LINK_BYTES), st.binary(max_size=2 * LINK_BYTES))
def test_chains_agree_exactly_as_far_as_prompts_do(start: bytes, one: bytes, other: bytes) -> None:
    first, second = start + one, start + other
    chains = chain_of(first), chain_of(second)
    assert [len(chain) for chain in chains] == [len(first) // LINK_BYTES, len(second) // LINK_BYTES]
    for i, (a, b) in enumerate(zip(*chains, strict=False), 1):
        assert (a == b) == (first[: i * LINK_BYTES] == second[: i * LINK_BYTES])


def test_a_chain_is_bounded_and_salted() -> None:
    assert len(chain_of(b"x" * LINK_BYTES * (MAX_LINKS + 5))) == MAX_LINKS
    assert not set(chain_of(b"x" * LINK_BYTES, b"mine")) & set(chain_of(b"x" * LINK_BYTES, b"yours"))


def test_whose_a_request_is_and_what_it_begins_with() -> None:
    system = {"role": "system", "content": "You are helpful. " * 20}
    one = json.dumps({"messages": [system, {"role": "user", "content": "Why?"}]}).encode()
    two = json.dumps({"messages": [system, {"role": "user", "content": "How?"}], "user": "ada"}).encode()
    shared = len(json.dumps(system)) // LINK_BYTES
    assert placement_key("Bearer a", one).chain[:shared] == placement_key("Bearer a", two).chain[:shared]
    assert placement_key("Bearer a", one).tenant != placement_key("Bearer b", one).tenant
    assert placement_key("Bearer a", two).tenant == "Bearer a ada"
    ids = json.dumps({"prompt": list(range(500))}).encode()
    assert len(placement_key("", ids).chain) > 4


def test_requests_with_other_adapters_share_nothing() -> None:
    def links(**body: object) -> tuple[int, ...]:
        return placement_key("", json.dumps({"prompt": "x" * 800, **body}).encode()).chain

    different = [
        links(),
        links(model="law"),
        links(model="ode"),
        links(cache_salt="law"),
        links(dsc={"adapters": {"law": 1}}),
        links(dsc={"adapters": {"law": 2}}),
        links(dsc={"adapters": {"law": 2}, "composition": "product_of_sums"}),
    ]
    assert all(chains for chains in different)
    assert len(set().union(*different)) == sum(map(len, different))
    assert links(model="law", user="ada") == links(model="law", dsc={"priority": 3}) == links(model="law")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"messages": "no"}', b'{"user": 7}', b"\xff"])
def test_a_body_that_cannot_be_read_still_finds_a_replica(body: bytes) -> None:
    placement = placement_key("Bearer a", body)
    assert placement == PlacementKey("Bearer a")
    assert set(order(placement, Ring(NAMES), (), IDLE, BOUND)) <= set(NAMES)


def test_chats_begin_alike_as_far_as_templates_write_them_alike() -> None:
    """Tools come first, then instructions and what has been said; a response's input is a chat's messages."""
    tools, said, long = [{"name": "t" * 400}], [{"role": "user", "content": "x" * 400}], "i" * 400

    def links(**body: object) -> tuple[int, ...]:
        return placement_key("", json.dumps(body).encode()).chain

    assert links(tools=tools, messages=said)[:2] == links(tools=tools, messages=[])[:2]
    assert links(messages=said)[0] != links(tools=tools, messages=said)[0]
    assert links(instructions=long, input="a")[:2] == links(instructions=long, input="b")[:2] != ()
    assert links(input="x" * 400) and links(input="x" * 400) != links(input="y" * 400)


def test_keys_spread_evenly_and_few_move_when_a_replica_leaves() -> None:
    keys = [asked(f"tenant {i}").key for i in range(4000)]
    before, after = Ring(NAMES), Ring(NAMES[:-1])
    owners = {key: next(before.walk(key)) for key in keys if key is not None}
    counts = Counter(owners.values())
    assert min(counts.values()) > 0.5 * len(keys) / len(NAMES)
    assert max(counts.values()) < 1.7 * len(keys) / len(NAMES)
    moved = [key for key, owner in owners.items() if next(after.walk(key)) != owner]
    assert len(moved) == counts[NAMES[-1]]


def test_a_walk_meets_every_replica_once() -> None:
    ring = Ring(NAMES)
    assert sorted(ring.walk(2**64 - 1)) == sorted(NAMES)
    assert len(ring._points) == POINTS * len(NAMES)


def test_who_holds_the_longest_known_beginning_is_asked_first() -> None:
    ring, memory = Ring(NAMES), PrefixMemory()
    system = "You are helpful. " * 30
    short, long = asked("ada", system), asked("ada", system + "Tell me of ships. " * 30)
    memory.record(short.chain, NAMES[3])
    memory.record(long.chain, NAMES[7])
    assert memory.holders(asked("bob", system + "Tell me of ships. " * 40).chain, NAMES) == (NAMES[7],)
    assert memory.holders(short.chain, NAMES) == (NAMES[3],)
    assert memory.holders(short.chain[:-1], NAMES) == (NAMES[7], NAMES[3])
    assert memory.holders(long.chain, NAMES[:5]) == (NAMES[3],)
    assert memory.holders(asked("ada", "Other. " * 100).chain, NAMES) == ()
    assert order(long, ring, {NAMES[7]}, IDLE, BOUND)[0] == NAMES[7]


def test_a_holder_that_is_too_busy_is_passed_over() -> None:
    ring, placement = Ring(NAMES), asked("ada", "x" * 1000)
    loads = {**IDLE, NAMES[7]: 8}
    found = order(placement, ring, {NAMES[7]}, loads, BOUND)
    assert found[0] == next(name for name in ring.walk(placement.key or 0) if name != NAMES[7])
    assert NAMES[7] not in found
    assert order(placement, ring, {NAMES[7]}, {**IDLE, NAMES[7]: 7}, BOUND)[0] == NAMES[7]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=len(NAMES)), st.integers(0, 2**32), st.integers(0, 9))
def test_no_replica_is_asked_first_beyond_its_bound(loads: list[int], tenant: int, held: int) -> None:
    named = dict(zip(NAMES, loads, strict=False))
    found = order(asked(str(tenant)), Ring(named), {NAMES[held % len(loads)]}, named, BOUND)
    assert len(set(found)) == len(found) and set(found) <= set(named)
    assert min(named.values()) in [named[name] for name in found]
    assert named[found[0]] < BOUND.most(named.values())


def test_requests_with_nothing_in_common_go_where_least_is_done() -> None:
    loads = {"a": 3, "b": 0, "c": 1}
    assert order(asked(prompt="Hi"), Ring(loads), (), loads, BOUND) == ["b", "c", "a"]


def test_one_popular_beginning_is_shared_out_within_the_bound() -> None:
    ring, memory, loads = Ring(NAMES), PrefixMemory(), dict(IDLE)
    placement = asked("everybody", "The same long question. " * 30)
    for _ in range(200):
        name = order(placement, ring, memory.holders(placement.chain, NAMES), loads, BOUND)[0]
        memory.record(placement.chain, name)
        loads[name] += 1
    assert max(loads.values()) <= 1.25 * 201 / len(NAMES) + 1


def test_the_memory_is_bounded_and_forgets_the_oldest() -> None:
    memory = PrefixMemory(size=10)
    for i in range(20):
        memory.record([i], NAMES[0])
    assert [i for i in range(20) if memory.holders([i], NAMES)] == list(range(10, 20))
