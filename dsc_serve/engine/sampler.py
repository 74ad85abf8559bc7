"""From logits to tokens: penalties, filters and one uniform number per token, vectorised over mixed requests.

A token depends on its row of logits, its request's parameters, seed and position alone, never on the other rows. The
kept set is drawn from by inverting its cumulative distribution in vocabulary order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dsc_kernels import native, ops, plain
from dsc_serve.engine.output import TokenLogprobs
from dsc_serve.engine.penalties import adjust_together
from dsc_serve.engine.position import Position

CANDIDATES = 256  # most likely tokens looked at first; wider kept sets are found by their threshold
MASK64 = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from splitmix64, started at the hash of the seed and advanced by position.

    The seed is hashed first: choices' seeds differ by splitmix64's own increment, and would share one shifted sequence.
    """
    return (finalise(finalise(seed) + (position + 1) * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def finalise(z: int) -> int:
    """The splitmix64 finaliser of z modulo 2⁶⁴."""
    z &= MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def is_greedy(request: Position) -> bool:
    """Whether a request's next token is that of the largest logit, and nothing else of the logits is asked for."""
    p = request.params
    changed = p.logit_bias or p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1
    free = request.constraint is None and p.logprobs is None and request.output_size >= p.min_tokens
    return p.greedy and free and not changed


class Sampler:
    """Samples one token for each row of a step's logits.

    eos: tokens that end a text, masked before min_tokens are reached.
    """

    def __init__(self, eos: Sequence[int]) -> None:
        self.eos = tuple(eos)

    def __call__(self, logits: Tensor, requests: Sequence[Position]) -> list[int]:
        """One token id per row of logits float32 [R, V]; the logits are changed in place."""
        return read(self.draw(logits, requests))

    def draw(self, logits: Tensor, requests: Sequence[Position]) -> Tensor:
        """The same where the logits are: int64 [R]."""
        if logits.device.type == "cpu":
            for row, request in enumerate(requests):
                self._adjust(logits[row], request)
        else:
            adjust_together(logits, requests, self.eos)
        backend = ops.backend(logits.dtype, logits.device)
        if backend.name == native.name:
            return draw_natively(logits, requests)
        if backend.name != plain.name or logits.device.type != "cpu":
            return draw_on_device(logits, requests)
        random = [i for i, r in enumerate(requests) if not r.params.greedy]
        if not random:
            return logits.argmax(dim=1)
        tokens = logits.argmax(dim=1) if len(random) < len(requests) else logits.new_zeros(len(requests)).long()
        chosen = [requests[i] for i in random]
        tokens[random] = draw(logits if len(random) == len(requests) else logits[random], chosen)
        return tokens

    def _adjust(self, row: Tensor, request: Position) -> None:
        """Bias, penalties and the mask of early ends on one row [V] on the host, in place."""
        p = request.params
        if p.logit_bias:
            row[torch.tensor(list(p.logit_bias))] += torch.tensor(list(p.logit_bias.values()), dtype=row.dtype)
        if p.repetition_penalty != 1:
            ids = torch.from_numpy(request.token_counts(0).tokens)
            values = row[ids]
            row[ids] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        if (p.presence_penalty or p.frequency_penalty) and request.output_size:
            output = request.token_counts(request.prompt_size)
            amount = torch.from_numpy(output.counts).to(row.dtype) * p.frequency_penalty + p.presence_penalty
            row[torch.from_numpy(output.tokens)] -= amount
        if request.output_size < p.min_tokens:
            ends = [*p.stop_token_ids, *(() if p.ignore_eos else self.eos)]
            if ends:
                row[torch.tensor(ends)] = -torch.inf


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on the device, where it is needed, without waiting for what the device has yet to do."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def read(tokens: Tensor) -> list[int]:
    """Token ids int64 [R] as numbers: the one place where a step waits for the device."""
    return [int(t) for t in tokens.tolist()]


def draw_natively(logits: Tensor, requests: Sequence[Position]) -> Tensor:
    """Tokens of rows of float32 logits [R, V] on the CPU, greedy or not, by the C++ kernel."""
    params, vocabulary = [r.params for r in requests], logits.shape[1]
    columns = (
        np.array([p.temperature for p in params], dtype=np.float32),
        np.array([p.top_k if 0 < p.top_k < vocabulary else vocabulary for p in params], dtype=np.int64),
        np.array([p.top_p for p in params], dtype=np.float64),
        np.array([p.min_p for p in params], dtype=np.float32),
        np.array([0.0 if r.params.greedy else uniform(r.seed, r.num_tokens) for r in requests], dtype=np.float64),
    )
    return native.sample(logits, *map(torch.from_numpy, columns))


def draw_on_device(logits: Tensor, requests: Sequence[Position]) -> Tensor:
    """Tokens of rows of float32 logits [R, V], greedy or not, by operations whose sizes the host knows beforehand."""
    tokens, vocabulary = logits.argmax(dim=1), logits.shape[1]
    if all(r.params.greedy for r in requests):
        return tokens
    fields = [
        (
            p.temperature,
            p.top_k if 0 < p.top_k < vocabulary else vocabulary,
            p.top_p,
            p.min_p,
            uniform(r.seed, r.num_tokens),
        )
        for r in requests
        for p in [r.params]
    ]
    columns = to_device(torch.tensor(fields, dtype=torch.float64), logits.device)
    temperature, top_k, top_p, min_p, u = columns[:, :, None].unbind(1)
    weights = relative_weights(logits, torch.where(temperature == 0, 1.0, temperature).float())
    if ops.triton_serves(weights.dtype, weights.device):
        return ops.sampled(weights, columns, tokens)
    if any(field[1:4] != (vocabulary, 1, 0) for field in fields):
        weights = keep_sorted(weights, top_k, top_p, min_p.float())
    return torch.where(temperature[:, 0] == 0, tokens, invert(weights, u))


def prepare(vocabulary: int, device: torch.device) -> None:
    """Compile what sampling needs, before requests wait for it."""
    if ops.triton_serves(torch.float32, device):
        one = torch.ones(1, vocabulary, device=device)
        ops.sampled(one, torch.ones(1, 5, dtype=torch.float64, device=device), one.argmax(dim=1))


def relative_weights(logits: Tensor, temperature: Tensor) -> Tensor:
    """exp(logits / temperature) [R, V] relative to each row's largest, so never too large.

    Where none is finite all are 1: a fair draw harms no other row.
    """
    return ((logits - logits.amax(dim=1, keepdim=True)) / temperature).exp_().float().nan_to_num_(nan=1.0)


def draw(logits: Tensor, requests: Sequence[Position]) -> Tensor:
    """Sample rows of logits [R, V] whose requests have a temperature above 0 → token ids int64 [R]."""
    device, vocabulary = logits.device, logits.shape[1]

    def column(values: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)[:, None]

    params = [r.params for r in requests]
    top_k = [p.top_k if 0 < p.top_k < vocabulary else vocabulary for p in params]
    plain = torch.tensor([top_k[i] == vocabulary and p.top_p == 1 and p.min_p == 0 for i, p in enumerate(params)])
    temperature = column([p.temperature for p in params], torch.float32)
    weights = relative_weights(logits, temperature)
    u = column([uniform(r.seed, r.num_tokens) for r in requests])
    if bool(plain.all()):
        return invert(weights, u)
    k, top_p = column(top_k, torch.int64), column([p.top_p for p in params])
    min_p = column([p.min_p for p in params], torch.float32)
    tokens = torch.empty(len(params), dtype=torch.int64, device=device)
    free, some = (torch.nonzero(rows).squeeze(1).to(device) for rows in (plain, ~plain))
    tokens[free] = invert(weights[free], u[free])
    tokens[some] = draw_filtered(weights[some], k[some], top_p[some], min_p[some], u[some])
    return tokens


def invert(weights: Tensor, u: Tensor) -> Tensor:
    """The first index of each row of weights [R, n] ≥ 0 whose cumulative share exceeds u [R, 1]."""
    cumulative = weights.double().cumsum(dim=1)
    total = cumulative[:, -1:]
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def draw_filtered(weights: Tensor, k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor) -> Tensor:
    """Sample from the kept set of each row of weights [R, V]; k, top_p, min_p and u are [R, 1].

    In falling order of weight, the kept set is the prefix within k tokens, within those at least min_p of the largest,
    and up to the first at which the mass reaches top_p of the k tokens' mass. Where that prefix ends within the
    CANDIDATES largest, nothing else is looked at.
    """
    vocabulary = weights.shape[1]
    head = min(CANDIDATES, vocabulary)
    values, ids = plain.top_k(weights, head)
    cumulative = values.double().cumsum(dim=1)
    limit = torch.minimum(k, (weights >= min_p).sum(dim=1, keepdim=True))
    within_head = cumulative.gather(1, k.clamp(max=head) - 1)
    mass = torch.where(k <= head, within_head, weights.double().sum(dim=1, keepdim=True))
    reached = cumulative >= top_p * mass
    mass_known = (k <= head) | (k == vocabulary) | (top_p == 1)
    ends_in_head = (limit <= head) | (reached[:, -1:] & (top_p < 1))
    size = torch.where(top_p < 1, torch.minimum(limit, (~reached).sum(dim=1, keepdim=True) + 1), limit)
    kept = torch.arange(head, device=weights.device) < size
    order = torch.where(kept, ids, vocabulary).argsort(dim=1)
    picks = invert(torch.where(kept, values, 0.0).gather(1, order), u)[:, None]
    tokens = ids.gather(1, order.gather(1, picks)).squeeze(1)
    wide = torch.nonzero(~(mass_known & ends_in_head).squeeze(1)).squeeze(1)
    if wide.numel():
        tokens[wide] = invert(keep(weights[wide], k[wide], top_p[wide], min_p[wide]), u[wide])
    return tokens


def keep(weights: Tensor, k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """weights [R, V] with everything outside the kept sets (see `draw_filtered`) set to 0."""
    kept = prefix(weights, torch.ones_like(weights, dtype=torch.float64), k.double())
    mass = kept.double()
    kept = torch.where(top_p < 1, prefix(kept, mass, top_p * mass.sum(dim=1, keepdim=True)), kept)
    return torch.where(kept >= min_p, kept, 0.0)


def keep_sorted(weights: Tensor, k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """As `keep`, by sorting each row: slow, but a device without Triton's kernels is never waited for."""
    values, ids = weights.sort(dim=1, descending=True, stable=True)
    within = torch.arange(weights.shape[1], device=weights.device) < k
    reached = torch.where(within, values, 0.0).double().cumsum(dim=1)
    ahead = torch.nn.functional.pad(reached[:, :-1], (1, 0))
    kept = within & (values >= min_p) & ((top_p == 1) | (ahead < top_p * reached[:, -1:]))
    return torch.zeros_like(weights).scatter(1, ids, torch.where(kept, values, 0.0))


def prefix(weights: Tensor, measure: Tensor, amount: Tensor) -> Tensor:
    """weights [R, V] ≥ 0 with 0 outside the shortest prefix, in falling order, whose measure reaches amount [R, 1].

    No row is sorted: a histogram over the upper 16 bits of the weights, which order as the weights do, finds the bucket
    in which the prefix ends, and only that bucket's few members are. Equal weights count in vocabulary order.
    """
    rows = torch.arange(weights.shape[0], device=weights.device)[:, None]
    bits = weights.view(torch.int32)
    buckets = (bits >> 16).long()
    count = 1 << 15
    histogram = torch.zeros(weights.shape[0] * count, dtype=torch.float64, device=weights.device)
    histogram.scatter_add_(0, (buckets + rows * count).flatten(), measure.flatten())
    falling = histogram.view(-1, count).flip(1).cumsum(dim=1)
    position = (falling < amount).sum(dim=1, keepdim=True).clamp(max=count - 1)
    edge = count - 1 - position
    before = torch.where(position > 0, falling.gather(1, (position - 1).clamp(min=0)), 0.0)
    members = torch.nonzero(buckets == edge)
    row, column = members[:, 0], members[:, 1]
    order = torch.argsort((row << 32) | (0x7FFFFFFF - bits[row, column].long()), stable=True)
    row, column = row[order], column[order]
    rank = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    passed = torch.zeros(weights.shape[0], weights.shape[1] + 1, dtype=measure.dtype, device=weights.device)
    passed[row, rank + 1] = measure[row, column]  # a row of its own for each: one sum over all would round with company
    ahead = before[row, 0] + passed.cumsum(dim=1)[row, rank]
    inside = buckets > edge
    inside[row, column] = ahead < amount[row, 0]
    return torch.where(inside, weights, 0.0)


def logprobs(logits: Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[TokenLogprobs]:
    """Log probabilities of one chosen token per row of logits [R, V], with `top[i]` alternatives for row i."""
    if not len(tokens):
        return []
    normalised = logits.log_softmax(dim=1)
    chosen = normalised.gather(1, torch.tensor(tokens, device=logits.device)[:, None]).squeeze(1).tolist()
    values, ids = normalised.topk(min(max(top), logits.shape[1]), dim=1)
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return [
        TokenLogprobs(token, value, list(zip(i[:n], v[:n], strict=True)))
        for token, value, n, (i, v) in zip(tokens, chosen, top, pairs, strict=True)
    ]
