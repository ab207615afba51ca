"""Combinations made ready ahead by others, kills between trials, and budgets: what is found stays the same."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import featherweight as fw
import problems
from featherweight.balance.combine import crew
from featherweight.balance.combine.budget import FIGURES
from featherweight.balance.combine.trials import READY, Many, Trials
from featherweight.errors import RecipeError
from problems import PROBLEMS

SMALL = PROBLEMS["mlp"]
NETWORK = problems.network(SMALL)
#: splits that lie in memory, as they can be sent to another process
TASK = fw.Task(**{split: list(problems.task(SMALL).batches(split)) for split in ("calibration", "validation")},
               score=fw.scores.top1, score_name="top-1 %")


def looked(out: Path, task: fw.Task = TASK, **options: Any) -> fw.Found:
    given = {"families": ("channels", "integers"), "trials": 5, "seconds": 0.0, "minimize": "file_bytes", **options}
    return fw.search(NETWORK, task, fw.Budget(file_bytes=0.9, score_drop=100.0), out=out, **given)


def told(found: fw.Found) -> list[Any]:
    """All that does not depend on a clock."""
    trials = [(t.what, t.drop, t.failed, {n: s for n, s in t.shares.items() if n != "latency"}) for t in found.trials]
    return [trials, found.chosen.what, found.recipe.to_toml(), dict(found.missed)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, fw.Found]:
    """The search in one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    return out, looked(out)


def same_files(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in ("network.fw", "model.onnx"))


def test_workers_in_any_order_and_lost_ones_change_no_answer(
        alone: tuple[Path, fw.Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def backwards(trials: Trials, many: Many) -> None:
        """The last first; the first is lost, and one more leaves half of its work."""
        asked.append(len(many))
        assert not any((trials.place(steps) / READY).exists() for _, steps in many)
        for what, steps in reversed(many[1:]):
            other = dataclasses.replace(trials, crew=None)
            assert other.ready(what, steps).measured is not None
        if len(many) > 1:
            (trials.place(many[1][1]) / "model.onnx").write_bytes(b"half")

    @contextmanager
    def made(workers: int, trials: Trials) -> Iterator[Any]:
        yield backwards

    monkeypatch.setattr("featherweight.balance.combine.job.crew_of", made)
    found = looked(tmp_path / "out", workers=2)
    assert told(found) == told(alone[1])
    assert same_files(tmp_path / "out", alone[0])
    assert max(asked) == crew.EACH * 2


def test_kills_between_all_trials_end_with_the_same(alone: tuple[Path, fw.Found], tmp_path: Path) -> None:
    class Killed(BaseException):
        """Stands for SIGKILL."""

    for number in range(1, len(alone[1].trials) + 1):
        def stop(what: str, done: float, total: float, figures: Any, name: str = f"trial {number}:") -> None:
            if what.startswith(name):
                raise Killed

        with pytest.raises(Killed):
            looked(tmp_path / "out", progress=stop)
    assert told(looked(tmp_path / "out")) == told(alone[1])
    assert same_files(tmp_path / "out", alone[0])


def test_workers_without_ray_are_refused_with_a_line_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(RecipeError, match=r"pip install 'featherweight\[ray\]'"):
        looked(tmp_path / "out", workers=2)
    with pytest.raises(RecipeError, match="workers"):
        looked(tmp_path / "out", workers=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_workers_of_ray_one_of_them_killed(alone: tuple[Path, fw.Found], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    here, lost, threads = os.getpid(), tmp_path / "lost", torch.get_num_threads()

    def score(network: Any, batches: Any) -> float:
        if os.getpid() != here and not lost.exists():
            lost.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        assert torch.get_num_threads() == threads
        return float(fw.scores.top1(network, batches))

    found = looked(tmp_path / "out", dataclasses.replace(TASK, score=score), workers=2)
    assert lost.exists(), "a worker was killed"
    assert told(found) == told(alone[1])
    assert same_files(tmp_path / "out", alone[0])


@pytest.mark.slow
def test_budgets_are_kept_or_said_to_be_missed_with_the_closest(tmp_path: Path) -> None:
    """Twenty random budgets that a combination is known to keep: the shipped file is inside all limits every time; and
    of three that none keeps, the closest that was found is told."""
    known = looked(tmp_path / "out", trials=16, families=("channels", "low rank", "integers"))
    chance = np.random.default_rng(0)
    able = [t for t in known.trials if t.what != "nothing" and not t.failed]
    counted = [name for name in FIGURES if name not in ("latency", "memory")]
    for _ in range(20):
        trial = able[chance.integers(len(able))]
        limited = chance.choice(counted, chance.integers(1, len(counted) + 1), replace=False)
        limits = {str(n): float(min(trial.shares[n] * chance.uniform(1.0, 1.1), 1.0)) for n in limited}
        limits["score_drop"] = max(trial.drop, 0.0) + float(chance.uniform(0, 2))
        found = fw.search(NETWORK, TASK, fw.Budget(**limits), out=tmp_path / "out", trials=40, seconds=0.0,
                          families=("channels", "low rank", "integers"), minimize="file_bytes")
        first, last = found.result.trail[0], found.result.trail[-1]
        assert not found.missed, (trial.what, limits)
        assert first.score - last.score <= limits.pop("score_drop")  # type: ignore[operator]
        assert all(getattr(last, n) <= limit * getattr(first, n) for n, limit in limits.items())
    for name in counted:
        found = fw.search(NETWORK, TASK, fw.Budget(**{name: 0.01}), out=tmp_path / "out", trials=12, seconds=0.0,
                          families=("channels", "low rank", "integers"))
        closest = min(t.shares[name] for t in found.trials if not t.failed)
        assert "0.01 asked; this is the closest that was found" in found.missed[name]
        assert found.chosen.shares[name] == closest
