"""The search itself: each family alone first, then whatever combination the measurements so far promise most of.

What a trial gives is never guessed in the end: the surrogate (``surrogate``) only says what to try next, and
the answer is the best of the combinations that were tried.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from featherweight.balance.combine.amounts import as_small, families, voids, without
from featherweight.balance.combine.axes import Picks, Space, told
from featherweight.balance.combine.surrogate import fit
from featherweight.balance.combine.trials import Trial, Trials
from featherweight.balance.combine.wanted import DROP, Wanted
from featherweight.balance.combine.watch import Watch
from featherweight.recover import Train
from featherweight.steps import Step

#: how much better a combination must promise to be than the best known, as a share, to be tried
GAIN = 0.02
#: share of the trials, or of the time, that families alone may take but for the first amount of each
ALONE = 0.5
#: trials that are made without getting nearer to limits that are missed, before they are given up
PATIENCE = 12
#: drops of so many times what is allowed end the curve of a family
FAR = 4.0
#: amounts beyond the largest ones of the families that were tried, which a combination may hold, all families together
AHEAD = 2


@dataclass
class Seeker:
    """One search. tell: called with what is tried, and how many were. probe: the short training of trials, which those
    get that lose too much without it. expect: called with what is tried next and what may be tried after it, and
    whether that is nearly sure; it makes no difference to what is tried. both: what was tried without a training and
    with one; the better is what is known of it. untold: what was not trained, as it costs no less than the best: what
    it would lose is not known.
    """

    trials: Trials
    space: Space
    wanted: Wanted
    watch: Watch
    most: int
    tell: Callable[[str, int], None]
    probe: Train | None = None
    known: dict[Picks, Trial] = field(default_factory=dict)
    both: dict[Picks, tuple[Trial, Trial]] = field(default_factory=dict)
    untold: set[Picks] = field(default_factory=set)
    expect: Callable[[Iterable[tuple[str, Sequence[Step]]], bool], None] = lambda many, sure: None

    def run(self) -> None:
        """Tries families alone and then combinations, until nothing promises to be better, ``most`` were tried or the
        time is over."""
        self.known.update({picks: min(two, key=self._worth) for picks, two in self.both.items()})
        self.alone()
        while self._spent < 1:
            picks = self.promising()
            if picks is None:
                return
            self._try(picks, self._likely, sure=False)

    @property
    def _nothing(self) -> Picks:
        return (0,) * len(self.space.names)

    @property
    def _spent(self) -> float:
        """The share of the trials, or of the time, that is spent."""
        return max(self.watch.spent, len(self.known) / self.most)

    @property
    def best(self) -> Picks:
        """The best of all that were tried."""
        return self.best_of(trained=True)[0]

    def best_of(self, trained: bool) -> tuple[Picks, Trial]:
        """The best of all, or of those that are not to be trained, and its trial."""
        every = self.known if trained else {
            picks: self.both[picks][0] if trial.probe and picks in self.both else trial
            for picks, trial in self.known.items()}
        return min(((picks, trial) for picks, trial in every.items() if trained or not trial.probe),
                   key=lambda one: self.wanted.rank(one[1]))

    def hoped(self) -> tuple[Picks, Trial] | None:
        """Of what was shortly trained and costs less than the best, what is nearest to the limits; None where nothing
        is near."""
        least = self.wanted.figure(self.known[self.best], self.wanted.minimize)
        near = [(picks, trial) for picks, trial in self.known.items() if trial.probe and not self._far(trial)
                and self.wanted.figure(trial, self.wanted.minimize) < least - GAIN * abs(least)]
        return min(near, key=lambda one: self.wanted.rank(one[1]), default=None)

    def learn(self, picks: Picks, trial: Trial, trained: bool) -> None:
        """Told what a combination came to as it shipped."""
        if picks in self.both:
            plain, short = self.both[picks]
            self.both[picks] = (plain, trial) if trained else (trial, short)
            trial = min(self.both[picks], key=self._worth)
        self.known[picks] = trial

    def _try(self, picks: Picks, then: Callable[[], Iterable[Picks]], sure: bool = True) -> Trial:
        if self._open(picks):
            self.tell(told(self.space.chosen(picks)), len(self.known))
            new = [picks, *(p for p in then() if self._open(p) and p != picks)]
            trial = self._taken(new, None, sure)
            self.untold.discard(picks)
            if self._needs_training(picks, trial):
                if self._pays(picks, trial):
                    self.both[picks] = trial, self._taken(new, self.probe, sure)
                    trial = min(self.both[picks], key=self._worth)
                else:
                    self.untold.add(picks)
            self.known[picks] = trial
        return self.known[picks]

    def _taken(self, new: Sequence[Picks], training: Train | None, sure: bool) -> Trial:
        """The trial of the first of ``new``; the others may be asked for after it."""
        many = ((told(self.space.chosen(picks)), self.space.steps(picks, training)) for picks in new)
        self.expect(many, sure)
        return self.trials.taken(told(self.space.chosen(new[0])), self.space.steps(new[0], training))

    def _worth(self, trial: Trial) -> tuple[bool, float, float]:
        """One combination without a training and with one in the order of their worth: they differ in what is lost."""
        failed, missed, _ = self.wanted.rank(trial)
        return failed, missed, self.wanted.figure(trial, DROP)

    def _needs_training(self, picks: Picks, trial: Trial) -> bool:
        """Whether a combination can be trained, and loses more than it may, or as little as possible is to be lost,
        as where the drop has no limit."""
        if self.probe is None or trial.failed or self.space.steps(picks, self.probe) == self.space.steps(picks):
            return False
        return self.wanted.minimize == DROP or trial.drop > self.wanted.limits.get(DROP, -float("inf"))

    def _pays(self, picks: Picks, trial: Trial) -> bool:
        """Whether a training can make a combination the best, as it costs less than the best that keeps limits.
        Families alone are trained in any case, for their curves."""
        best = self.known.get(self.best) if self.known else None
        return (best is None or len(families(picks)) < 2 or self.wanted.minimize == DROP or not self.wanted.met(best)
                or self.wanted.figure(trial, self.wanted.minimize) < self.wanted.figure(best, self.wanted.minimize))

    def _open(self, picks: Picks) -> bool:
        """Whether a combination was not tried, or not trained although it pays now."""
        return picks not in self.known or (picks in self.untold and self._pays(picks, self.known[picks]))

    def alone(self, share: float = ALONE) -> None:
        """Every family alone, at every other amount, until too much of the score is gone or a larger one does no more;
        all families' first amounts come before any one's second, however long they take, and what needs no training
        before what cuts; then those first whose last amount was worth most, for a ``share`` of the time."""
        amounts = {axis: list(range(1, len(offers) + 1, 2)) for axis, offers in enumerate(self.space.offers)}
        left = dict(reversed(amounts.items()))
        last = dict.fromkeys(left, self._try(self._nothing, partial(self._alone, left)))
        while any(left.values()):
            for axis in sorted(left, key=lambda one: self.wanted.rank(last[one])):
                if self._spent > (share if 1 not in left[axis] else 1):
                    return
                if left[axis]:
                    before, pick = last[axis], left[axis].pop(0)
                    trial = last[axis] = self._try(self.space.alone(axis, pick), partial(self._alone, left))
                    if trial.failed or self._far(trial) or (pick > 1 and as_small(trial, before)):
                        left[axis].clear()

    def _far(self, trial: Trial, times: float = FAR) -> bool:
        """Whether so many times what is allowed is lost that more of the same is in vain."""
        allowed = self.wanted.limits.get(DROP, 10 * self.wanted.points)
        return self.wanted.figure(trial, DROP) > times * max(allowed, self.wanted.points)

    def _alone(self, left: Mapping[int, Sequence[int]]) -> Iterator[Picks]:
        """Families alone at the amounts that are left, all first ones before any second one."""
        for row in itertools.zip_longest(*left.values()):
            yield from (self.space.alone(axis, pick) for axis, pick in zip(left, row, strict=True) if pick)

    # ---- what to try next
    def _likely(self) -> Iterator[Picks]:
        """The untried combinations, from what promises most on."""
        ahead = [picks for picks in self._reachable() if self._open(picks)]
        figures = self._predicted(ahead)
        yield from (ahead[int(i)] for i in self.wanted.order(figures))

    def promising(self) -> Picks | None:
        """The untried combination that promises most; None where none promises to be better than the best known, whose
        limits are kept, or were long not got nearer to."""
        ahead = [picks for picks in self._reachable() if self._open(picks)]
        if not ahead:
            return None
        figures = self._predicted(ahead)
        beyond = self.wanted.beyond(figures)
        _, missed, least = self.wanted.rank(self.known[self.best])
        first = int(self.wanted.order(figures)[0])
        if beyond[first] < missed - GAIN or (missed and self._idle < PATIENCE):
            return ahead[first]
        gained = least - float(figures[self.wanted.minimize][first])
        enough = self.wanted.points / 10 if self.wanted.minimize == DROP else GAIN * least
        return ahead[first] if beyond[first] <= missed and gained > enough else None

    @property
    def _idle(self) -> int:
        """How many trials were made since the best."""
        return len(self.known) - 1 - list(self.known).index(self.best)

    def expected(self) -> tuple[Picks, dict[str, float]]:
        """The combination that promises most of all, tried or not, and what it promises."""
        every = self._reachable()
        figures = self._predicted(every)
        first = int(self.wanted.order(figures)[0])
        return every[first], {name: float(values[first]) for name, values in figures.items()}

    def _reachable(self) -> list[Picks]:
        """Combinations of families that did not fail alone, each beyond the amounts at which it did nothing (alone, or
        beside the same others), and near those that were tried and did not lose far too much (too much, once limits
        are kept): no curve says what lies far beyond. More than two families come together only where all but one of
        them did, as two may spoil what each gives alone (integers and chains of low rank). Once limits are kept,
        nothing is reached that takes as much of all families as what lost far too much."""
        axes = range(len(self.space.names))
        made = {picks: trial for picks, trial in self.known.items() if not trial.failed}
        kept = self.wanted.met(self.known[self.best])
        clear = {picks: trial for picks, trial in made.items() if picks not in self.untold}
        fine = [picks for picks, trial in clear.items() if not self._far(trial, 1.0 if kept else FAR)]
        lost = [picks for picks, trial in clear.items() if kept and self._far(trial)]
        most = [max((picks[axis] for picks in fine), default=0) for axis in axes]
        useless = {axis for axis in axes if all(
            trial.failed for picks, trial in self.known.items() if families(picks) == {axis})}
        met, void = {families(picks) for picks in made}, voids(made)

        def near(picks: Picks) -> bool:
            return sum(max(pick - known, 0) for pick, known in zip(picks, most, strict=True)) <= AHEAD and all(
                axis not in useless and void.get((axis, without(picks, axis)), 0) < picks[axis]
                for axis in families(picks))

        def paired(picks: Picks) -> bool:
            mine = families(picks)
            return len(mine) < 3 or any(mine - {axis} in met for axis in mine)

        return [picks for picks in self.space.all() if near(picks) and paired(picks)
                and not any(all(map(operator.ge, picks, far)) for far in lost)]

    def _predicted(self, ahead: Sequence[Picks]) -> dict[str, npt.NDArray[np.float64]]:
        """Figure -> what the surrogate expects of each combination."""
        made = {picks: trial for picks, trial in self.known.items() if not trial.failed}
        asked, found = self.space.positions(ahead), {}
        for name in {*self.wanted.limits, self.wanted.minimize}:
            tried = {picks: trial for picks, trial in made.items() if name != DROP or picks not in self.untold}
            places = self.space.positions(list(tried))
            figures = np.array([self.wanted.figure(trial, name) for trial in tried.values()])
            if name == DROP:
                found[name] = fit(places, figures, rising=True).at(asked)
            else:
                found[name] = np.exp(fit(places, np.log(figures)).at(asked))
        return found


def front(trials: Sequence[Trial], figure: str) -> tuple[Trial, ...]:
    """The trials of which no other has both less of ``figure`` and a smaller drop, the cheapest first."""
    found: list[Trial] = []
    for trial in sorted((t for t in trials if not t.failed), key=lambda t: (t.shares.get(figure, 1.0), t.drop)):
        if not found or trial.drop < found[-1].drop:
            found.append(trial)
    return tuple(found)


__all__ = ["Seeker", "front"]
