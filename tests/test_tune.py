"""Options of a whole pipeline: paths and ranges, the scores on the way, kills, and runs that are given up."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import featherweight as fw
import problems
from featherweight.balance.tuning.ranges import Range, changed, held
from featherweight.balance.tuning.rungs import WHAT, Rungs
from featherweight.errors import RecipeError
from problems import PROBLEMS

SMALL = PROBLEMS["mlp"]
NETWORK = problems.network(SMALL)
STEPS = (fw.prune.Channels(macs=0.5), fw.recover.Train(lr=0.01, epochs=2, distill=fw.distill.Logits()))
OVER: dict[str, Any] = {"2.lr": (1e-4, 1.0), "2.epochs": (1, 3), "2.distill.weight": [0.1, 0.9]}


@torch.no_grad()
def fit(network: Any, batches: Any) -> float:
    """A score without steps: minus the loss."""
    return -sum(float(F.cross_entropy(network(inputs), target)) for inputs, target in batches)


def task(**changes: Any) -> fw.Task:
    splits = {split: list(problems.task(SMALL).batches(split)) for split in ("train", "calibration", "validation")}
    return fw.Task(**{**splits, "loss": F.cross_entropy, "score": fit, "score_name": "fit", **changes})


def test_options_by_path() -> None:
    assert held(STEPS, "2.distill.weight") == STEPS[1].distill.weight  # type: ignore[attr-defined]
    found = changed(STEPS, {"1.macs": 0.25, "2.distill.weight": 0.5, "2.lr": 0.1})
    assert found == (fw.prune.Channels(macs=0.25),
                     fw.recover.Train(lr=0.1, epochs=2, distill=fw.distill.Logits(weight=0.5)))
    beside = (fw.recover.Train(beside=(fw.distill.Logits(),)),)
    assert changed(beside, {"1.beside.0.temperature": 2.0})[0].beside[0].temperature == 2.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(("over", "said"), [
    ({}, "no options"), ({"lr": (0.1, 0.2)}, "the number of a step"), ({"3.lr": (0.1, 0.2)}, "there are 2"),
    ({"2.rate": (0.1, 0.2)}, "no 'rate'"), ({"2.lr": (0.2, 0.1)}, "for a range"), ({"2.lr": 0.1}, "for choices"),
    ({"2.lr": (True, 2)}, "for a range"), ({"2.lr": []}, "for choices")])
def test_wrong_options_are_refused_before_any_work(over: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        fw.tune(NETWORK, task(), STEPS, over, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_optuna_or_a_score_it_is_said_what_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="Task\\(score="):
        fw.tune(NETWORK, task(score=None), STEPS, OVER)
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(RecipeError, match=r"pip install 'featherweight\[tune\]'"):
        fw.tune(NETWORK, task(), STEPS, OVER, out=tmp_path)


def test_a_range_asks_for_what_it_holds() -> None:
    class Asked:
        def __getattr__(self, name: str) -> Any:
            return lambda *given, **named: (name, given, named)

    assert Range.of("1.lr", (0.01, 0.2)).suggested(Asked()) == ("suggest_float", ("1.lr", 0.01, 0.2), {"log": True})
    assert Range.of("1.w", (0.1, 0.9)).suggested(Asked())[2] == {"log": False}
    assert Range.of("1.n", (1, 9)).suggested(Asked())[:2] == ("suggest_int", ("1.n", 1, 9))
    assert Range.of("1.s", ["a", "b"]).suggested(Asked())[:2] == ("suggest_categorical", ("1.s", ["a", "b"]))
    assert Range.of("1.n", (1, 9)).holds(3)
    assert not Range.of("1.n", (1, 9)).holds(3.5)
    assert not Range.of("1.s", ["a", "b"]).holds("c")


def test_scores_on_the_way_change_no_training() -> None:
    told: list[tuple[float, float]] = []

    def hear(what: str, done: float, total: float, figures: Any) -> None:
        if what == WHAT:
            told.append((done, figures["score"]))

    train = fw.recover.Train(epochs=4, lr=0.05)
    plain = train.fit(NETWORK, task(), fw.steps.Context(original=NETWORK))
    watched = fw.recover.Train(epochs=4, lr=0.05, beside=(Rungs(first=3),)).fit(
        NETWORK, task(), fw.steps.Context(original=NETWORK, progress=hear))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert [number for number, _ in told] == [4, 5, 6]
    before, after = (fit(net, task().batches("validation")) for net in (NETWORK, plain))
    assert all(min(before, after) - 1 < score < max(before, after) + 1 for _, score in told)
    assert len({score for _, score in told}) == 3


def test_a_tuning_killed_again_and_again_ends_with_the_same(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="Optuna is not installed")

    class Killed(BaseException):
        """Stands for SIGKILL."""

    def run(out: str, progress: Any = None) -> Any:
        return fw.tune(NETWORK, task(), STEPS[1:], over, out=tmp_path / out, trials=6, seconds=0.0, progress=progress)

    over = {path.replace("2.", "1."): values for path, values in OVER.items()}
    whole, kills, left = run("whole"), 0, 0

    def stop(*given: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed

    for _ in itertools.count():
        left = 31
        try:
            found = run("killed", stop)
            break
        except Killed:
            kills += 1
    assert kills > 2

    def told(tuned: Any) -> list[Any]:
        return [(dict(r.options), r.rungs, r.trial and r.trial.drop) for r in tuned.runs]

    assert told(found) == told(whole)
    assert (tmp_path / "whole/network.fw").read_bytes() == (tmp_path / "killed/network.fw").read_bytes()
    runs = [run for run in whole.runs if run.trial is not None]
    assert dict(whole.runs[0].options) == {"1.lr": 0.01, "1.epochs": 2, "1.distill.weight": 0.9}
    assert 0 < len(runs) < len(whole.runs), "some were given up"
    best = min(runs, key=lambda run: run.trial.drop)
    assert best.options == whole.options
    first, last = whole.result.trail[0], whole.result.trail[-1]
    assert first.score - last.score == pytest.approx(best.trial.drop, abs=1e-6)
    longer = fw.tune(NETWORK, task(), STEPS[1:], over, out=tmp_path / "whole", trials=7, seconds=0.0)
    assert told(longer)[:6] == told(whole)
    more = fw.tune(NETWORK, task(), STEPS[1:], {"1.lr": [0.01], "1.epochs": [2], "1.distill.weight": [0.9],
                                                "1.momentum": [0.9]}, out=tmp_path / "whole", trials=1, seconds=0.0)
    assert dict(more.options) == {"1.lr": 0.01, "1.epochs": 2, "1.distill.weight": 0.9, "1.momentum": 0.9}
