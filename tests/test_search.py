"""The search over combinations of families: limits, the surrogate, what is tried, kills, and the answer."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import featherweight as fw
import problems
from featherweight.balance.combine import surrogate
from featherweight.balance.combine.axes import AXES, Amount, Axis, Space
from featherweight.balance.combine.found import _row as row_of
from featherweight.balance.combine.seek import Seeker, front
from featherweight.balance.combine.training import left_by, of_training, short
from featherweight.balance.combine.trials import Trial
from featherweight.balance.combine.wanted import DROP, Wanted
from featherweight.balance.combine.watch import Watch
from featherweight.cli import show
from featherweight.cli.app import app
from featherweight.cli.progress import Listener
from featherweight.cli.search import run
from featherweight.errors import RecipeError
from featherweight.report.shape import check_shape
from problems import PROBLEMS

SMALL = PROBLEMS["mlp"]
NETWORK, TASK = problems.network(SMALL), problems.task(SMALL)
TWO = ("channels", "integers")


# ---- limits

@pytest.mark.parametrize(("given", "share"), [
    ({"latency": 0.5}, 0.5), ({"latency": "0.5x"}, 0.5), ({"latency": "2 ms"}, 0.5), ({"latency": "2000us"}, 0.5),
    ({"file_bytes": "15 kB"}, 0.25), ({"file_bytes": "0.015MB"}, 0.25), ({"macs": "40 M"}, 2.0),
    ({"macs": "4e7"}, 2.0)])
def test_limits_are_shares_or_absolute(given: dict[str, Any], share: float) -> None:
    found = fw.Budget(**given).limits({"latency": 0.004, "file_bytes": 60_000, "macs": 2e7})
    assert list(found.values()) == pytest.approx([share])


@pytest.mark.parametrize("given", [
    {}, {"latency": 2}, {"latency": 0}, {"latency": -0.5}, {"latency": True}, {"latency": "2"}, {"latency": "2 kB"},
    {"latency": "1.5x"}, {"latency": "fast"}, {"file_bytes": "3 ms"}, {"file_bytes": float("nan")},
    {"score_drop": -1}, {"score_drop": "1"}, {"score_drop": float("inf")}, {"macs": "0 M"}])
def test_wrong_limits_are_refused_with_a_line_to_write(given: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"fw\.Budget\("):
        fw.Budget(**given)


@pytest.mark.parametrize(("given", "said"), [
    ({"minimize": "size"}, "minimize"), ({"families": ("channel",)}, "channels"), ({"trials": 0}, "trials"),
    ({"minutes": 0}, "minutes"), ({"target": "tvm"}, "tvm")])
def test_wrong_options_of_a_search(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(fw.errors.FeatherweightError, match=said):
        fw.search(NETWORK, TASK, fw.Budget(macs=0.5), out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_limit_of_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(RecipeError, match="memory='20 MB', which cannot be measured here"):
        fw.Budget(memory="20 MB").limits({"latency": 0.004})


# ---- the surrogate

def test_the_surrogate_beside_a_slow_one() -> None:
    rng = np.random.default_rng(0)
    alone = [(1.0, 0.0), (2.0, 0.0), (0.0, 0.5), (0.0, 1.5)]
    places = np.array([(0.0, 0.0), *alone, (1.0, 0.5), (2.0, 1.5), (0.3, 0.2)])
    values = np.array([0.0, *rng.uniform(0, 2, len(places) - 1)])
    fitted, asked = surrogate.fit(places, values), rng.uniform(0, 3, (40, 2)) * rng.integers(0, 2, (40, 2))

    def curve(axis: int, x: float) -> float:
        points = [(0.0, 0.0), *sorted((p[axis], v) for p, v in zip(places, values, strict=True)
                                      if p[axis] and not p[1 - axis])]
        for (a, u), (b, v) in itertools.pairwise(points):
            if x <= b or b == points[-1][0]:
                return u + (v - u) * (x - a) / (b - a)
        raise AssertionError

    def slow(x: float, y: float) -> float:
        total, weights, missed = curve(0, x) + curve(1, y), surrogate.PRIOR, 0.0
        for (a, b), value in zip(places, values, strict=True):
            near = np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * surrogate.WIDTH**2))
            near *= (x != 0 or a == 0) and (y != 0 or b == 0)
            weights += near
            missed += near * (value - curve(0, a) - curve(1, b)) if a and b else 0
        return float(total + missed / weights)

    assert fitted.at(asked) == pytest.approx([slow(x, y) for x, y in asked])
    assert fitted.at(places[6:7]) == pytest.approx(values[6:7], abs=0.1)  # far from the others


# ---- what is tried

def space_of(names: str, amounts: int) -> Space:
    """An axis for each letter; what each of its amounts does is a world's own (``Made``)."""
    return Space(tuple(names), tuple(
        tuple(Amount(str(i), i / 4, fw.prune.Layers(count=i, names=(name,))) for i in range(1, amounts + 1))
        for name in names))


def seeker_of(made: Any, space: Space, wanted: Wanted, most: int = 9, probe: fw.recover.Train | None = None) -> Seeker:
    return Seeker(made, space, wanted, Watch(None), most, lambda what, done: None, probe)


class Made:
    """Trials of a world in which costs multiply and drops add up, but for what two axes do together."""

    def __init__(self, space: Space, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.space, self.asked = space, 0
        self.rate, self.hurt = rng.uniform(0.5, 1.2, 3), rng.uniform(0.05, 0.6, 3)
        self.joint = rng.uniform(-0.1, 0.3)

    def of(self, picks: tuple[int, ...]) -> Trial:
        x = self.space.positions([picks])[0]
        drop = float((self.hurt * x**2).sum() + self.joint * x[0] * x[1])
        return Trial(str(picks), {"latency": float(np.exp(-(self.rate * x).sum()))}, drop)

    def taken(self, what: str, steps: Sequence[Any]) -> Trial:
        self.asked += 1
        numbers = [next((s.count for s in steps if s.names == (name,)), 0) for name in self.space.names]
        return self.of(tuple(numbers))


@pytest.mark.parametrize("seed", range(6))
def test_what_is_found_is_nearly_what_trying_everything_finds(seed: int) -> None:
    """Few trials, no worse than 5 % beside all 729 combinations."""
    space = space_of("abc", 8)
    made, wanted = Made(space, seed), Wanted({DROP: 1.0}, "latency", 0.1)
    seeker = seeker_of(made, space, wanted, 80)
    seeker.run()
    every = [made.of(picks) for picks in space.all()]
    best = min((t for t in every if wanted.met(t)), key=lambda t: t.shares["latency"])
    found = seeker.known[seeker.best]
    assert len(every) == 729
    assert made.asked <= 80
    assert wanted.met(found)
    assert found.shares["latency"] <= 1.05 * best.shares["latency"]


class Trained(Made):
    """Of what is lost beyond the points that the short training itself costs, training leaves a fifth."""

    def taken(self, what: str, steps: Sequence[Any]) -> Trial:
        plain = super().taken(what, [step for step in steps if isinstance(step, fw.prune.Layers)])
        short = len(steps) > sum(isinstance(step, fw.prune.Layers) for step in steps)
        self.short = [*getattr(self, "short", []), *([plain] if short else [])]
        return dataclasses.replace(plain, drop=2.0 + 0.2 * plain.drop, probe=True) if short else plain


@pytest.mark.parametrize(("minimize", "limits"), [("latency", {DROP: 0.4}), (DROP, {"latency": 0.5})])
def test_only_what_loses_too_much_is_trained(minimize: str, limits: dict[str, float]) -> None:
    made, wanted = Trained(space_of("abc", 8), 0), Wanted(limits, minimize, 0.1, short=2.0)
    seeker = seeker_of(made, made.space, wanted, 80, fw.recover.Train(epochs=1))
    seeker.run()
    best = seeker.known[seeker.best]
    assert wanted.met(best)
    assert best.probe
    plain = [trial for trial in seeker.known.values() if not trial.probe]
    if minimize == DROP:
        assert len(plain) == 1  # nothing at all
    else:
        assert {trial.what for trial in made.short} == {t.what for t in seeker.known.values() if t.probe}
        assert all(trial.drop > 0.4 for trial in made.short)
        assert len(plain) > 1


def test_what_is_measured_once_more_keeps_a_little_away_from_its_limit() -> None:
    wanted = Wanted({"latency": 0.5, "macs": 0.5}, DROP, 0.1)
    near = Trial("", {"latency": 0.495, "macs": 0.5}, 0.0)
    assert not wanted.met(near)
    assert wanted.met(dataclasses.replace(near, shipped=True))
    assert wanted.met(dataclasses.replace(near, shares={"latency": 0.48, "macs": 0.5}))
    assert not wanted.met(dataclasses.replace(near, shares={"latency": 0.505, "macs": 0.5}, shipped=True))


def test_what_costs_no_less_than_the_best_is_not_trained_until_that_is_the_best_no_more() -> None:
    made = Trained(space_of("ab", 2), 0)
    seeker = seeker_of(made, made.space, Wanted({DROP: 0.3}, "latency", 0.1, short=2.0), 80, fw.recover.Train(epochs=1))
    made.of = lambda picks: Trial(str(picks), {"latency": 0.5 if picks == (1, 1) else 1.0}, 0.5 * sum(picks))  # type: ignore[method-assign]
    for picks in ((0, 0), (1, 0), (1, 1), (1, 2)):
        seeker._try(picks, lambda: ())
    assert {t.what for t in made.short} == {"(1, 0)", "(1, 1)"}  # one family alone, for its curve
    assert seeker.untold == {(1, 2)}
    assert seeker._predicted([(1, 2)])[DROP] < 1.0  # its 1.5 points say nothing
    seeker.learn((1, 1), Trial("", {"latency": 0.5}, 2.0), trained=True)
    assert seeker._open((1, 2)) is False  # (1, 0) keeps the limit, and costs as much
    seeker.known[1, 0] = seeker.known[0, 0] = Trial("", {"latency": 1.0}, 0.4)
    assert seeker._open((1, 2))
    seeker._try((1, 2), lambda: ())
    assert made.short[-1].what == "(1, 2)"
    assert not seeker.untold


def test_amounts_that_change_nothing_alone_are_in_no_combination() -> None:
    seeker = seeker_of(None, space_of("ab", 3), Wanted({}, "latency", 0.1))
    same = {"latency": 1.02, "file_bytes": 1.0, "macs": 1.0}
    seeker.known = {(0, 0): Trial("", same, 0.0), (1, 0): Trial("", same, 0.0), (3, 0): Trial("", {"macs": 0.9}, 0.1),
                    (0, 1): Trial("", {}, 0.0, failed="no"), (0, 3): Trial("", {}, 0.0, failed="no")}
    assert seeker._reachable() == [(0, 0), (2, 0), (3, 0)]


def test_combinations_stay_near_the_amounts_that_were_tried() -> None:
    """A family that gained by noise at its mildest amount is not taken to gain ever more beyond it."""
    seeker = seeker_of(None, space_of("ab", 8), Wanted({DROP: 1.0}, "latency", 0.1))
    seeker.known = {(0, 0): Trial("", {"latency": 1.0}, 0.0), (1, 0): Trial("", {"latency": 0.9}, -0.2),
                    (0, 4): Trial("", {"latency": 0.5}, 0.5), (0, 5): Trial("", {}, 0.0, failed="no")}
    reached = set(seeker._reachable())
    assert {(3, 4), (2, 5), (1, 6)} <= reached
    assert not reached & {(4, 0), (3, 5), (2, 6), (0, 7)}
    drops = seeker._predicted([(1, 0), (2, 0), (3, 0), (0, 5)])[DROP]
    assert drops[:3] == pytest.approx([-0.2] * 3)
    assert drops[3] == pytest.approx(0.625)


def test_what_is_hoped_for_is_nearest_to_the_limits_and_costs_less() -> None:
    seeker = seeker_of(None, space_of("a", 8), Wanted({DROP: 0.5}, "latency", 1.0, left=0.25))
    seeker.known = {(0,): Trial("", {"latency": 1.0}, 0.0), (1,): Trial("", {"latency": 0.5}, 0.1),
                    (2,): Trial("", {"latency": 0.495}, 2.1, probe=True),
                    (3,): Trial("", {"latency": 0.4}, 2.6, probe=True),
                    (4,): Trial("", {"latency": 0.3}, 3.0, probe=True),
                    (5,): Trial("", {"latency": 0.3}, 1.0), (6,): Trial("", {}, 0.0, probe=True, failed="no")}
    hoped = seeker.hoped()
    assert hoped is not None
    assert hoped[0] == (3,)
    seeker.known = {(0,): Trial("", {"latency": 1.0}, 0.0), (4,): Trial("", {"latency": 0.3}, 20.0, probe=True)}
    assert seeker.hoped() is None


def test_what_did_nothing_beside_the_same_others_is_not_tried_at_less() -> None:
    seeker = seeker_of(None, space_of("ab", 4), Wanted({}, "macs", 0.1))
    seeker.known = {picks: Trial("", {"macs": macs}, 0.1) for picks, macs in {
        (0, 0): 1.0, (1, 0): 0.9, (2, 0): 0.5, (0, 1): 0.9, (0, 3): 0.7, (2, 3): 0.5}.items()}
    reached = set(seeker._reachable())
    assert {(1, 1), (1, 2), (2, 4)} <= reached
    assert not reached & {(2, 1), (2, 2), (2, 3)}


def test_what_lost_far_too_much_leads_no_further() -> None:
    """It extends no family's reach, and once limits are kept, nothing that takes as much of all is reached."""
    seeker = seeker_of(None, space_of("ab", 8), Wanted({DROP: 1.0}, "latency", 0.1))
    seeker.known = {(0, 0): Trial("", {"latency": 1.0}, 0.0), (1, 0): Trial("", {"latency": 0.9}, 0.1),
                    (0, 1): Trial("", {"latency": 0.9}, 0.1), (3, 3): Trial("", {"latency": 0.4}, 9.0)}
    reached = set(seeker._reachable())
    assert {(3, 0), (3, 1), (2, 2)} <= reached
    assert not reached & {(4, 0), (0, 4), (3, 3)}


def test_of_families_alone_those_that_give_most_go_on_first() -> None:
    class Unlike(Made):
        def of(self, picks: tuple[int, ...]) -> Trial:
            shares = np.prod([1 - pick / weight for pick, weight in zip(picks, (40, 10, 20), strict=True)])
            return Trial(str(picks), {"latency": float(shares), "macs": float(shares)}, 0.0)

    made = Unlike(space_of("abc", 4), 0)
    seeker = seeker_of(made, made.space, Wanted({DROP: 1.0}, "latency", 0.1), 80)
    seeker.alone()
    assert list(seeker.known)[1:] == [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 3, 0), (0, 0, 3), (3, 0, 0)]


def test_a_family_ends_where_larger_amounts_do_no_more() -> None:
    class Ends(Made):
        """Beyond 3 all amounts do the same."""

        def of(self, picks: tuple[int, ...]) -> Trial:
            return Trial(str(picks), {"macs": 1 - min(picks[0], 3) / 10, "latency": 1 - min(picks[0], 3) / 10}, 0.0)

    made = Ends(space_of("a", 8), 0)
    seeker = seeker_of(made, made.space, Wanted({DROP: 1.0}, "latency", 0.1), 80)
    seeker.alone()
    assert list(seeker.known) == [(0,), (1,), (3,), (5,)]


def test_pairs_come_before_three_families_together() -> None:
    seeker = seeker_of(None, space_of("abc", 1), Wanted({}, "latency", 0.1))
    seeker.known = {picks: Trial("", {"macs": 0.9}, 0.0) for picks in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}
    assert (1, 1, 1) not in seeker._reachable()
    assert (0, 1, 1) in seeker._reachable()
    seeker.known[0, 1, 1] = Trial("", {"macs": 0.8}, 0.0)
    assert (1, 1, 1) in seeker._reachable()


def test_what_families_do_to_one_another_counts_where_all_of_them_are() -> None:
    """Of a halves and b halves, both together make nothing less: that is no word on a alone, nor on a and c."""
    places = np.array([(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)], dtype=float)
    halves = np.log([1.0, 0.5, 0.5, 0.5, 1.0])
    told = np.exp(surrogate.fit(places, halves).at(np.array([(1.0, 0, 1), (1, 0, 0), (1, 1, 1)])))
    assert told[:2] == pytest.approx([0.25, 0.5])
    assert told[2] > 0.125


def test_at_most_one_form_of_numbers() -> None:
    space = Space.of(NETWORK, {"archive_bytes"}, tuple(AXES))
    both = [space.chosen(picks) for picks in space.all()]
    assert {"integers", "codebooks"} <= set(space.names)
    assert not any({"integers", "codebooks"} <= set(chosen) for chosen in both)
    assert len({tuple(picks) for picks in space.all()}) == len(both)


def test_zeros_are_made_in_the_training_and_codebooks_behind_it() -> None:
    space, train = Space.of(NETWORK, {"archive_bytes"}, ("channels", "zeros", "codebooks")), fw.recover.Train(epochs=1)
    trained, codebook, vectors = space.steps((0, 1, 1), train)
    assert isinstance(trained, fw.recover.Train)
    assert [type(rewrite) for rewrite in trained.beside] == [fw.prune.Weights]
    assert isinstance(codebook, fw.share.Codebook)
    assert isinstance(vectors, fw.share.Vectors)
    assert [type(step) for step in space.steps((1, 0, 1), train)] == [
        fw.prune.Channels, fw.recover.Train, fw.share.Codebook, fw.share.Vectors]
    assert space.steps((0, 0, 1), train) == (codebook, vectors)


def test_families_that_cannot_help_are_left_out() -> None:
    assert "zeros" not in Space.of(NETWORK, {"latency"}, tuple(AXES)).names
    assert "integers" not in Space.of(NETWORK, {"macs"}, tuple(AXES)).names


@pytest.mark.parametrize(("wanted", "counted"), [
    ({"latency", "macs"}, "latency"), ({"macs", "file_bytes"}, "macs"), ({"archive_bytes"}, "bytes")])
def test_cuts_count_what_is_asked_for(wanted: set[str], counted: str) -> None:
    space = Space.of(NETWORK, wanted, ("channels", "low rank"), "elsewhere")
    steps = [offer.step for offers in space.offers for offer in offers]
    assert all(0 < getattr(step, counted) < 1 for step in steps)
    assert {step.times for step in steps} == {"elsewhere" if counted == "latency" else None}  # type: ignore[attr-defined]


def test_a_training_comes_after_the_cut_with_the_zeros_beside_it() -> None:
    space, train = Space.of(NETWORK, {"archive_bytes"}, ("channels", "zeros", "integers")), fw.recover.Train()
    for picks in itertools.product(range(2), repeat=3):
        kinds = [type(step) for step in space.steps(picks, train)]
        cut, zeros, integers = picks
        assert kinds == [fw.prune.Channels] * cut + [fw.recover.Train] * (cut or zeros) + [
            fw.quantize.Quantize] * integers
        assert [type(thing) for step in space.steps(picks, train) for thing in getattr(step, "beside", ())] == [
            fw.prune.Weights] * zeros


def test_a_trial_with_the_short_training_says_so() -> None:
    probe, shipped = (Trial("low rank", {}, 2.0, trained=not short, probe=short) for short in (True, False))
    assert row_of(probe, "latency").startswith("low rank, shortly trained, ")
    assert row_of(shipped, "latency").startswith("low rank, score")
    wanted = Wanted({DROP: 1.0}, "latency", 0.1, left=0.5)
    assert wanted.met(probe)
    assert not wanted.met(shipped)
    wanted = Wanted({DROP: 1.0}, "latency", 0.1, short=1.5, left=2.0)
    assert (wanted.figure(probe, DROP), wanted.figure(shipped, DROP)) == (1.0, 2.0)


def test_time_is_kept_for_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    watch, endless = Watch(10), Watch(None)
    now += 120
    assert (watch.spent, watch.left, endless.spent) == (0.2, 480.0, 0.0)
    for each, count, spent in ((60, 2, 0.25), (60, 9, 0.4),  # several: half of all at most
                               (360, 2, 0.5), (1e6, 2, 0.8)):  # one: up to three quarters
        watch.keep(each, count)
        assert (watch.spent, watch.left) == (spent, 480.0)
    endless.keep(1e6, 2)
    assert (endless.spent, endless.left) == (0.0, float("inf"))


@pytest.mark.parametrize(("epochs", "few", "rate"), [(1, 1, 0.1), (4, 1, 0.05), (160, 16, 0.1 / 10**0.5)])
def test_the_short_training(epochs: int, few: int, rate: float) -> None:
    made = short(fw.recover.Train(epochs=epochs, lr=0.1))
    assert made is not None
    assert (made.epochs, made.lr) == (few, pytest.approx(rate))


def test_a_training_of_no_epochs_is_as_short_as_it_is() -> None:
    train = fw.recover.Train(epochs=0)
    assert short(train) == train


@pytest.mark.parametrize(("epochs", "left"), [(0, 1.0), (1, 1.0), (4, 0.434), (10, 0.25), (1000, 0.25)])
def test_the_longer_the_whole_training_is_beside_the_short_one_the_less_it_is_taken_to_leave(
        epochs: int, left: float) -> None:
    assert left_by(fw.recover.Train(epochs=epochs)) == pytest.approx(left, abs=1e-3)
    assert left_by(None) == 1.0


def test_a_training_that_helps_the_network_itself_is_no_credit_to_be_paid_back() -> None:
    class Gains:
        def start(self) -> Any:
            return SimpleNamespace(score=60.0)

        def ready(self, what: str, steps: Any) -> Any:
            return SimpleNamespace(measured=SimpleNamespace(score=70.0), seconds=2.0, failed="")

    cost, whole = of_training(Gains(), fw.recover.Train(epochs=20))  # type: ignore[arg-type]
    assert (cost, whole) == (0.0, 20.0)
    assert Wanted({DROP: 0.0}, "macs", 0.1, short=cost, left=0.4).met(Trial("", {}, -8.0, probe=True))


@pytest.mark.parametrize("minimize", ["latency", DROP])
def test_of_one_combination_the_version_that_loses_less_is_known(minimize: str) -> None:
    limits = {} if minimize == "latency" else {"latency": 0.6}
    seeker = Seeker(None, None, Wanted(limits, minimize, 0.1, left=0.5), Watch(None), 9,  # type: ignore[arg-type]
                    lambda what, done: None)
    plain, probe = Trial("", {"latency": 0.5}, 3.0), Trial("", {"latency": 0.5}, 4.0, probe=True)
    seeker.both[0,] = plain, probe
    seeker.learn((0,), shipped := Trial("", {"latency": 0.5}, 2.5, trained=True), trained=True)
    assert seeker.known[0,] == shipped
    assert seeker.best_of(trained=False) == ((0,), shipped)
    seeker.learn((0,), Trial("", {"latency": 0.5}, 3.5, trained=True), trained=True)
    assert seeker.known[0,] == plain
    seeker.learn((0,), Trial("", {}, 0.0, trained=True, failed="nan"), trained=True)
    assert seeker.known[0,] == plain
    seeker.known[0,], seeker.both[0,] = probe, (plain, probe)
    assert (seeker.best_of(trained=True), seeker.best_of(trained=False)) == (((0,), probe), ((0,), plain))


def test_the_best_that_needs_no_training() -> None:
    seeker = Seeker(None, None, Wanted({DROP: 1.0}, "latency", 0.1), Watch(None), 9,  # type: ignore[arg-type]
                    lambda what, done: None)
    seeker.known = {(0,): Trial("", {"latency": 1.0}, 0.0), (1,): Trial("", {"latency": 0.8}, 0.1),
                    (2,): Trial("", {"latency": 0.5}, 0.1, probe=True)}
    assert (seeker.best, seeker.best_of(trained=False)[0]) == ((2,), (1,))


def test_the_front() -> None:
    trials = [Trial(str(i), {"latency": x}, d) for i, (x, d) in enumerate([(1, 0), (0.5, 1), (0.6, 2), (0.4, 3)])]
    failed = Trial("failed", {}, 0.0, failed="no")
    assert [t.what for t in front([*trials, failed], "latency")] == ["3", "1", "0"]


# ---- all of it

def looked(out: Path, **options: Any) -> fw.Found:
    given = {"families": TWO, "trials": 6, "seconds": 0.01, "minimize": "file_bytes", **options}
    return fw.search(NETWORK, TASK, fw.Budget(file_bytes=0.9, score_drop=100.0), out=out, **given)


def test_a_search_stopped_and_gone_on_with_keeps_its_budget_and_its_recipe_makes_the_same_files(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(what: str, done: float, total: float, figures: Any) -> None:
        if what.startswith("trial 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        looked(tmp_path / "out", progress=stop)
    kept = {file.name: file.read_bytes() for file in (tmp_path / "out/search").glob("*.json")}
    assert len(kept) == 5  # the fingerprint, the original, three trials
    found = looked(tmp_path / "out")
    assert all((tmp_path / "out/search" / name).read_bytes() == held for name, held in kept.items())
    first, last = found.result.trail[0], found.result.trail[-1]
    assert not found.missed
    assert last.file_bytes <= 0.9 * first.file_bytes
    assert found.chosen.shares["file_bytes"] == last.file_bytes / first.file_bytes
    assert found.chosen.shares["file_bytes"] == min(t.shares["file_bytes"] for t in found.trials)
    assert set(found.alone) == set(TWO)
    assert found.chosen in found.trials
    assert "chosen:" in str(found)
    fw.compress(NETWORK, TASK, fw.Recipe.from_toml(tmp_path / "out/recipe.toml"), out=tmp_path / "again", seconds=0.01)
    for name in ("network.fw", "model.onnx"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr("featherweight.measure.measure", never)
    again = looked(tmp_path / "out").to_dict()
    assert again == found.to_dict()
    assert json.loads((tmp_path / "out/search.json").read_text()) == again


def test_another_task_is_refused(tmp_path: Path) -> None:
    looked(tmp_path / "out", trials=2)
    with pytest.raises(RecipeError, match="score_name"):
        fw.search(NETWORK, fw.Task(validation=TASK.validation, calibration=TASK.calibration, train=TASK.train,
                                   loss=TASK.loss, score=TASK.score, score_name="another"),
                  fw.Budget(macs=0.5), out=tmp_path / "out", families=TWO, trials=2, seconds=0.01)


def test_limits_that_nothing_keeps_are_told(tmp_path: Path) -> None:
    found = fw.search(NETWORK, TASK, fw.Budget(file_bytes=0.001), out=tmp_path, families=TWO, trials=3, seconds=0.01)
    assert "0.001 asked" in found.missed["file_bytes"]


def test_a_family_that_fails_is_told_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Amount("nothing", 1.0, fw.prune.Weights(pattern="4:2"))
    monkeypatch.setitem(AXES, "depth", Axis(lambda network, counted: [broken], {"file_bytes"}))
    found = looked(tmp_path, families=("depth", "integers"))
    failed = [trial for trial in found.trials if trial.failed]
    assert [trial.what for trial in failed] == ["depth (nothing)"]
    assert "4:2" in failed[0].failed
    assert "integers" in found.chosen.what


def test_trials_take_up_operators_that_the_network_has(tmp_path: Path) -> None:
    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.diff(self.layer(x), dim=1)

    network = fw.capture(Steep().eval(), torch.randn(2, 8))
    data = [(torch.randn(4, 8), None)]
    found = fw.search(network, fw.Task(calibration=data, score=lambda predict, batches: 0.0),
                      fw.Budget(file_bytes=0.9), out=tmp_path, families=("integers",), trials=2, seconds=0.01)
    assert [trial.what for trial in found.trials if not trial.failed] == ["nothing", "integers (int8)"]


@pytest.mark.slow
def test_with_a_training_after_the_cut(tmp_path: Path) -> None:
    train = fw.recover.Train(epochs=1, lr=0.01)
    given: dict[str, Any] = {"out": tmp_path, "families": TWO, "trials": 5, "seconds": 0.01, "recover": train}
    found = fw.search(NETWORK, TASK, fw.Budget(macs=0.8), **given)
    assert train in found.recipe.steps
    assert found.chosen.trained
    loose = fw.search(NETWORK, TASK, fw.Budget(macs=0.8, score_drop=100.0), minimize="file_bytes", **given)
    assert train not in loose.recipe.steps
    assert not loose.chosen.trained
    any_drop = fw.search(NETWORK, TASK, fw.Budget(macs=0.8), minimize="macs", **given)
    assert train in any_drop.recipe.steps
    assert any_drop.chosen.trained
    with pytest.raises(RecipeError, match=r"does not stand: .*fw\.compress\(network, task, fw\.Recipe"):
        fw.search(NETWORK, TASK, fw.Budget(macs=0.8), **{**given, "recover": fw.recover.Train(epochs=1, lr=1e30)})


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "minimize", "rate"), [
    (fw.Budget(macs=0.9), DROP, 10.0),  # the whole training makes worse
    (fw.Budget(score_drop=5.0), "macs", 100.0)])  # its loss is NaN, and that of the short one is not
def test_a_training_that_makes_worse_is_left_out(budget: fw.Budget, minimize: str, rate: float, tmp_path: Path) -> None:
    found = fw.search(NETWORK, TASK, budget, minimize=minimize, out=tmp_path, families=("channels",), trials=9,
                      seconds=0.0, recover=fw.recover.Train(epochs=10, lr=rate))
    assert not found.missed
    assert not found.chosen.trained
    assert [type(step) for step in found.recipe.steps] == [fw.prune.Channels]
    files = [json.loads(file.read_text())["value"] for file in (tmp_path / "search").glob("????????????????.json")]
    plain = [trial for trial in files if not trial["probe"] and not trial["failed"]]
    kept = [trial for trial in plain if trial["shares"]["macs"] <= (budget.macs or 1.0)
            and trial["drop"] <= (budget.score_drop or float("inf"))]
    if minimize == DROP:
        assert found.chosen.drop <= min(trial["drop"] for trial in kept)
    else:
        assert found.chosen.shares["macs"] <= min(trial["shares"]["macs"] for trial in kept)
    assert len({(trial.what, trial.trained) for trial in found.trials}) == len(found.trials)
    assert found.chosen in found.trials
    check_shape(json.loads((tmp_path / "result.json").read_text()), "result.json")


# ---- the command line and the page

def test_a_job_with_a_goal(tmp_path: Path) -> None:
    NETWORK.save(tmp_path / "net.fw")
    job = fw.Job.from_toml(f'''
[model]
file = "{(tmp_path / "net.fw").as_posix()}"
[task]
factory = "test_search:small_task"
[compress]
seconds = 0.01
[goal]
file_bytes = 0.9
families = ["integers"]
trials = 2
''')
    assert fw.Job.from_toml(job.to_toml()) == job
    with pytest.raises(RecipeError, match="featherweight search"):
        job.run(out=tmp_path / "out")
    found = run(job, job.goal, tmp_path / "out", True, Listener(show.err))
    page = (tmp_path / "out/report.html").read_text()
    assert "What the search tried" in page
    assert "integers (int8)" in page
    check_shape(json.loads((tmp_path / "out/result.json").read_text()), "result.json")
    assert fw.Job.from_toml(tmp_path / "out/recipe.toml").recipe == found.recipe


@pytest.mark.parametrize(("goal", "steps", "said"), [
    ({}, "", r"\[goal\]"), ({"speed": 2}, "", "'speed'"), ({"latency": "fast"}, "", "fast"),
    ({"macs": 0.5}, '[[steps]]\nkind = "quantize.Quantize"', "the others are found")])
def test_wrong_goals(goal: dict[str, Any], steps: str, said: str, tmp_path: Path) -> None:
    NETWORK.save(tmp_path / "net.fw")
    job = fw.Job.from_toml(f'[model]\nfile = "{(tmp_path / "net.fw").as_posix()}"\n[task]\n'
                           f'factory = "test_search:small_task"\n{steps}\n')
    with pytest.raises(RecipeError, match=said):
        run(job, goal, tmp_path / "out", True, Listener(show.err))
    assert not (tmp_path / "out").exists()


def test_advice_is_what_was_measured_and_a_recipe_that_can_be_made(tmp_path: Path) -> None:
    NETWORK.save(tmp_path / "net.fw")
    command = ["advise", str(tmp_path / "net.fw"), "--task", "test_search:small_task", "--minutes", "0.02",
               "--out", str(tmp_path / "out")]
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert [layer["path"] for layer in found["layers"]] == [layer.path for layer in fw.measure.layers(NETWORK)]
    assert any(layer["seconds"] for layer in found["layers"])
    assert found["alone"][0]["what"] == "nothing"
    recipe = fw.Recipe.from_toml(found["recipe"])
    network = NETWORK
    for step in recipe.steps:
        network = step.plan(network, TASK).apply(network)  # type: ignore[union-attr]
    assert set(found["expected"]) == {"latency", "score_drop"}
    shown = CliRunner().invoke(app, command, env={"COLUMNS": "80"})
    assert "to start from" in shown.stdout
    assert all(len(line) <= 80 for line in shown.stdout.splitlines() if not line.startswith("to start"))


def small_task() -> fw.Task:
    return TASK
