"""Every distillation loss against the formula written out in loops over float64 numbers, and its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from featherweight.distill.losses import feature, relation, response, tokens

N, C, K, H = 4, 3, 5, 4
Rows = list[list[float]]


def soft(z: list[float], t: float = 1.0) -> list[float]:
    e = [math.exp(v / t) for v in z]
    return [v / sum(e) for v in e]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)


def norm(v: list[float]) -> float:
    return math.sqrt(sum(x * x for x in v))


def pearson(a: list[float], b: list[float]) -> float:
    a, b = [x - mean(a) for x in a], [x - mean(b) for x in b]
    return sum(x * y for x, y in zip(a, b, strict=True)) / (norm(a) * norm(b))


def turned(rows: Rows) -> Rows:
    return [list(column) for column in zip(*rows, strict=True)]


def products(a: Rows, b: Rows) -> Rows:
    return [[sum(x * y for x, y in zip(r, s, strict=True)) for s in b] for r in a]


def between(a: Rows, b: Rows) -> float:
    """Sum of squared differences."""
    return sum((x - y) ** 2 for r, s in zip(a, b, strict=True) for x, y in zip(r, s, strict=True))


# ---- response

def slow_kd(s: Tensor, t: Tensor) -> float:
    return mean(9 * kl(soft(q, 3.0), soft(p, 3.0)) for p, q in zip(s.tolist(), t.tolist(), strict=True))


CLASSES = torch.tensor([0, 2, 4, 2])


def slow_dkd(s: Tensor, t: Tensor) -> float:
    total = []
    for a, b, c in zip(s.tolist(), t.tolist(), CLASSES.tolist(), strict=True):
        q, p = soft(a, 2.0), soft(b, 2.0)
        others = [i for i in range(K) if i != c]
        among_q, among_p = soft([a[i] for i in others], 2.0), soft([b[i] for i in others], 2.0)
        total.append(4 * (kl([p[c], 1 - p[c]], [q[c], 1 - q[c]]) + 8 * kl(among_p, among_q)))
    return mean(total)


def slow_dist(s: Tensor, t: Tensor) -> float:
    p, q = ([soft(r, 2.0) for r in x.tolist()] for x in (s, t))
    inter = 1 - mean(pearson(a, b) for a, b in zip(p, q, strict=True))
    intra = 1 - mean(pearson(a, b) for a, b in zip(turned(p), turned(q), strict=True))
    return 4 * (inter + intra)


def slow_multi_level(s: Tensor, t: Tensor) -> float:
    total = 0.0
    for heat in (2.0, 4.0):
        p, q = ([soft(r, heat) for r in x.tolist()] for x in (s, t))
        total += mean(heat**2 * kl(b, a) for a, b in zip(p, q, strict=True))
        total += between(products(p, p), products(q, q)) / N
        total += between(products(turned(p), turned(p)), products(turned(q), turned(q))) / K
    return total / 2


def slow_standardized(s: Tensor, t: Tensor) -> float:
    def scaled(r: list[float]) -> list[float]:
        m = mean(r)
        deviation = math.sqrt(sum((v - m) ** 2 for v in r) / (len(r) - 1))
        return [(v - m) / (deviation + 1e-7) for v in r]
    return mean(9 * kl(soft(scaled(q), 3.0), soft(scaled(p), 3.0)) for p, q in zip(s.tolist(), t.tolist(), strict=True))


def slow_softened(s: Tensor, t: Tensor) -> float:
    """Targets mixed with the softmax of ``t``."""
    total = []
    for a, b, c in zip(s.tolist(), t.tolist(), CLASSES.tolist(), strict=True):
        wanted = [0.7 * (i == c) + 0.3 * p for i, p in enumerate(soft(b))]
        total.append(-sum(w * math.log(p) for w, p in zip(wanted, soft(a), strict=True)))
    return mean(total)


TARGET = torch.linspace(-1, 1, N * K, dtype=torch.float64).view(N, K)


def slow_bounded(s: Tensor, t: Tensor) -> float:
    total = []
    for a, b, y in zip(s.tolist(), t.tolist(), TARGET.tolist(), strict=True):
        own, bound = between([a], [y]), between([b], [y])
        total.append(own if own + 1.0 > bound else 0.0)
    return mean(total)


# ---- feature: maps [n, c, h, h]

def slow_hint(s: Tensor, t: Tensor) -> float:
    return mean((a - b) ** 2 for a, b in zip(s.flatten().tolist(), t.flatten().tolist(), strict=True))


def energy(x: Tensor) -> Rows:
    found = []
    for sample in x.flatten(2).tolist():
        row = [sum(channel[i] ** 2 for channel in sample) for i in range(H * H)]
        found.append([v / norm(row) for v in row])
    return found


def slow_attention(s: Tensor, t: Tensor) -> float:
    return between(energy(s), energy(t)) / N


def slow_similarity(s: Tensor, t: Tensor) -> float:
    found = []
    for x in (s, t):
        flat = x.flatten(1).tolist()
        found.append([[v / norm(r) for v in r] for r in products(flat, flat)])
    return between(*found) / N**2


def slow_pyramid(s: Tensor, t: Tensor) -> float:
    def cells(x: Tensor, count: int) -> Tensor:
        side = H // count
        return torch.stack([x[:, :, i * side:(i + 1) * side, j * side:(j + 1) * side].mean((2, 3))
                            for i in range(count) for j in range(count)], 2)
    levels = [(1.0, s, t), (0.5, cells(s, 2), cells(t, 2)), (0.25, cells(s, 1), cells(t, 1))]
    return sum(w * slow_hint(a, b) for w, a, b in levels) / 1.75


def slow_channelwise(s: Tensor, t: Tensor) -> float:
    pairs = zip(s.flatten(0, 1).flatten(1).tolist(), t.flatten(0, 1).flatten(1).tolist(), strict=True)
    return mean(16 * kl(soft(q, 4.0), soft(p, 4.0)) for p, q in pairs)


INSIDE = torch.zeros(N, H, H, dtype=torch.float64)
INSIDE[:, 1:3, :2] = 1


def slow_focal_global(s: Tensor, t: Tensor) -> float:
    def attentions(x: list[list[list[list[float]]]]) -> tuple[list[float], list[float]]:
        places = soft([mean(abs(x[c][i][j]) for c in range(C)) for i in range(H) for j in range(H)], 0.5)
        channels = soft([mean(abs(v) for row in x[c] for v in row) for c in range(C)], 0.5)
        return [H * H * v for v in places], [C * v for v in channels]

    sums, counts, apart_place, apart_channel, contexts = [0.0, 0.0], [0.0, 0.0], [], [], []
    for a, b, inside in zip(s.tolist(), t.tolist(), INSIDE.tolist(), strict=True):
        (place, channel), (own_place, own_channel) = attentions(b), attentions(a)
        for c in range(C):
            for i in range(H):
                for j in range(H):
                    ground = 0 if inside[i][j] > 0 else 1
                    sums[ground] += place[i * H + j] * channel[c] * (a[c][i][j] - b[c][i][j]) ** 2
                    counts[ground] += 1
        apart_place += [abs(x - y) for x, y in zip(place, own_place, strict=True)]
        apart_channel += [abs(x - y) for x, y in zip(channel, own_channel, strict=True)]
        both = []
        for x in (a, b):
            share = soft([mean(x[c][i][j] for c in range(C)) for i in range(H) for j in range(H)])
            both.append([sum(share[i * H + j] * x[c][i][j] for i in range(H) for j in range(H)) for c in range(C)])
        contexts.append(between([both[0]], [both[1]]) / C)
    return (sums[0] / counts[0] + 0.5 * sums[1] / counts[1] + 0.1 * (mean(apart_place) + mean(apart_channel))
            + mean(contexts))


# ---- tokens [n, t, c]

MASK = torch.tensor([[True, True, True, False], [True, True, False, False], [True] * 4, [True, False, False, False]])


def slow_hidden(s: Tensor, t: Tensor) -> float:
    return mean((a - b) ** 2 for x, y, m in zip(s.tolist(), t.tolist(), MASK.tolist(), strict=True)
                for r, q, counts in zip(x, y, m, strict=True) if counts for a, b in zip(r, q, strict=True))


def slow_maps(s: Tensor, t: Tensor) -> float:
    return mean(float((s[n, head, i, j] - t[n, head, i, j]) ** 2) for n in range(N) for i in range(4) if MASK[n, i]
                for head in range(2) for j in range(4))


def slow_relations(s: Tensor, t: Tensor) -> float:
    total = []
    for n in range(N):
        keys = [k for k in range(4) if MASK[n, k]]
        for head in range(2):
            part = slice(head * 2, head * 2 + 2)
            for i in keys:
                p, q = (soft([float(x[n, i, part] @ x[n, k, part]) / math.sqrt(2) for k in keys]) for x in (s, t))
                total.append(kl(q, p))
    return mean(total)


# ---- relation [n, c]

def huber(a: float, b: float) -> float:
    return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def slow_distance(s: Tensor, t: Tensor) -> float:
    found = []
    for x in (s.tolist(), t.tolist()):
        away = [[math.dist(a, b) for b in x] for a in x]
        size = mean(away[i][j] for i in range(N) for j in range(N) if i != j)
        found.append([v / size for row in away for v in row])
    return mean(huber(a, b) for a, b in zip(*found, strict=True))


def slow_angle(s: Tensor, t: Tensor) -> float:
    found = []
    for x in (s.tolist(), t.tolist()):
        def way(i: int, j: int, x: Rows = x) -> list[float]:
            d = [a - b for a, b in zip(x[j], x[i], strict=True)]
            return [v / norm(d) for v in d] if i != j else [0.0] * len(d)
        found.append([sum(a * b for a, b in zip(way(i, j), way(i, k), strict=True))
                      for i in range(N) for j in range(N) for k in range(N)])
    return mean(huber(a, b) for a, b in zip(*found, strict=True))


def slow_correlation(s: Tensor, t: Tensor) -> float:
    found = []
    for x in (s.tolist(), t.tolist()):
        unit = [[v / norm(r) for v in r] for r in x]
        found.append([math.exp(-0.4 * math.dist(a, b) ** 2) for a in unit for b in unit])
    return mean((a - b) ** 2 for a, b in zip(*found, strict=True))


BANK = torch.nn.functional.normalize(torch.randn(6, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
                                     dim=1)


def slow_contrastive(s: Tensor, t: Tensor) -> float:
    def h(a: list[float], b: list[float]) -> float:
        e = math.exp(sum(x * y for x, y in zip(a, b, strict=True)) / 0.5)
        return e / (e + 6)
    return mean(-math.log(h(a, b)) - sum(math.log(1 - h(a, c)) for c in BANK.tolist())
                for a, b in zip(s.tolist(), t.tolist(), strict=True))


@dataclass(frozen=True)
class Row:
    fast: Callable[[Tensor, Tensor], Tensor]
    slow: Callable[[Tensor, Tensor], float]
    shape: tuple[int, ...]
    #: the loss of a teacher taught by itself is zero
    zero: bool = True


MAP, LOGITS, TOKENS = (N, C, H, H), (N, K), (N, 4, 4)
LOSSES: dict[str, Row] = {
    "kd": Row(lambda s, t: response.divergence(s, t, 3.0), slow_kd, LOGITS),
    "dkd": Row(lambda s, t: response.decoupled(s, t, CLASSES, 2.0), slow_dkd, LOGITS),
    "dist": Row(lambda s, t: response.correlated(s, t, 2.0), slow_dist, LOGITS),
    "mlkd": Row(lambda s, t: response.multi_level(s, t, (2.0, 4.0)), slow_multi_level, LOGITS),
    "standardized": Row(lambda s, t: response.divergence(response.standardized(s), response.standardized(t), 3.0),
                        slow_standardized, LOGITS),
    "softened": Row(lambda s, t: response.soft_cross_entropy(s, response.softened(CLASSES, K, 0.3, t.softmax(1))),
                    slow_softened, LOGITS, zero=False),
    "bounded": Row(lambda s, t: response.bounded(s, t, TARGET, 1.0), slow_bounded, LOGITS, zero=False),
    "hint": Row(feature.hint, slow_hint, MAP),
    "attention": Row(feature.attention, slow_attention, MAP),
    "similarity": Row(feature.similarity, slow_similarity, MAP),
    "pyramid": Row(feature.pyramid, slow_pyramid, MAP),
    "channelwise": Row(feature.channelwise, slow_channelwise, MAP),
    "focal and global": Row(lambda s, t: feature.focal_global(s, t, INSIDE), slow_focal_global, MAP),
    "hidden": Row(lambda s, t: tokens.hidden(s, t, MASK), slow_hidden, TOKENS),
    "attention maps": Row(lambda s, t: tokens.attention_maps(s, t, MASK), slow_maps, (N, 2, 4, 4)),
    "relations of tokens": Row(lambda s, t: tokens.relations(s, t, 2, MASK), slow_relations, TOKENS),
    "distance": Row(relation.distance, slow_distance, (N, 3)),
    "angle": Row(relation.angle, slow_angle, (N, 3)),
    "correlation": Row(relation.correlation, slow_correlation, (N, 3)),
    "contrastive": Row(lambda s, t: relation.contrastive(s, t, BANK, 0.5), slow_contrastive, (N, 3), zero=False),
}


def both(row: Row) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(row.shape, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_formula_in_loops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", lambda x: x)  # all in float64
    row = LOSSES[name]
    student, teacher = both(row)
    assert float(row.fast(student, teacher)) == pytest.approx(row.slow(student, teacher), rel=1e-6)
    if row.zero:
        assert float(row.fast(teacher, teacher)) == pytest.approx(0, abs=1e-6)
        assert float(row.fast(student, teacher)) > 1e-4


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", lambda x: x)
    row = LOSSES[name]
    student, teacher = both(row)
    assert torch.autograd.gradcheck(lambda s: row.fast(s, teacher), student.requires_grad_(), fast_mode=True)


def test_smoothing_spreads_evenly_and_a_mask_leaves_out() -> None:
    assert torch.equal(response.softened(torch.tensor([1]), 4, 0.2), torch.tensor([[0.05, 0.85, 0.05, 0.05]]))
    s, t = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    wanted = response.divergence(s[mask], t[mask], 2.0)
    torch.testing.assert_close(response.divergence(s, t, 2.0, -1, mask), wanted)
    assert float(response.divergence(s, t, 2.0, -1, torch.zeros_like(mask))) == 0
    kept = torch.rand(2, 4, 4) < 0.5
    dropped = feature.dropped(torch.ones(2, 3, 4, 4), kept)
    assert torch.equal(dropped.sum(1), 3.0 * kept)
