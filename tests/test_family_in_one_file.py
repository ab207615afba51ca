"""A family of its own in one file: every weight of a layer becomes its sign times the mean of its layer's sizes.

The technique is the class ``SignOfMean``, its plan and what it offers for each layer: sixty lines. Laws, recipes, the
command line, the report, ``sensitivity``, ``Mixed`` and the archive take it from there, and no other file knows it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import featherweight as fw
import test_laws as laws
from featherweight.cli.app import app
from featherweight.judge.bench import Form
from featherweight.judge.candidates import FAMILIES, Candidate, Family, register
from featherweight.network import Network
from featherweight.network.layers import Skipped, select
from featherweight.recipe.kinds import register as register_kind
from featherweight.steps import Plan, Rewrite, Stage
from featherweight.steps.options import Numbers, check_numbers
from featherweight.task import Task
from problems import PROBLEMS, network, task

torch.set_num_threads(1)


# ---- the family
def signs(weight: Tensor) -> Tensor:
    """sign(w) * mean |w|: zeros stay zero."""
    return weight.sign() * weight.abs().mean()


@dataclass(frozen=True)
class SignPlan(Plan):
    """The weights of which the signs are kept."""

    kind: ClassVar[str] = "test.sign_of_mean/1"
    weights: tuple[str, ...] = ()

    def apply(self, network: Network) -> Network:
        other = network.copy()
        for name in self.weights:
            other.set_tensor(name, signs(other.tensor(name).detach()))
        other.changed()
        return other

    def summary(self) -> str:
        return f"signs of {len(self.weights)} weights"


@dataclass(frozen=True)
class SignOfMean(Rewrite):
    """Keeps of each weight its sign. min_size: smaller weights are left alone. ignore: patterns of layers."""

    min_size: int = 16
    ignore: tuple[str, ...] = ()
    stage: ClassVar[Stage] = Stage.PRECISION

    def check(self) -> None:
        check_numbers(self, {"min_size": Numbers(16, least=0, whole=True)})

    def plan(self, network: Network, task: Task) -> SignPlan:
        self.check()
        selected = select(network, self.ignore)
        small = [n.weight for n in selected.layers if network.tensor(n.weight).numel() < self.min_size]
        skipped = [Skipped(n, f"fewer weights than min_size={self.min_size}") for n in small]
        return SignPlan(tuple(n.weight for n in selected.layers if n.weight not in small),
                        skipped=(*selected.skipped, *skipped))


@dataclass(frozen=True)
class Signs(Family):
    """What ``SignOfMean`` offers: one form a layer."""

    name: ClassVar[str] = "test.sign_of_mean"
    stage: ClassVar[Stage] = Stage.PRECISION
    options: tuple[int, ...] = (1,)

    def candidates(self, network: Network, task: Task, layer: str | None = None) -> tuple[Candidate, ...]:
        return tuple(Candidate(one.weight, self.name, option, Form(weights={one.weight: signs}),
                               lambda name=one.weight: SignPlan((name,)))
                     for one in select(network).layers for option in self.options if layer in (None, one.weight))

    def joined(self, plans: Sequence[Plan]) -> tuple[Plan, ...]:
        return (SignPlan(tuple(name for plan in plans for name in plan.weights)),)


# ---- what it gets for that
register_kind("test.SignOfMean", SignOfMean)
NETWORKS = ("residual", "tied")
LAWS = [getattr(laws, name) for name in sorted(vars(laws)) if name.startswith("test_")
        and {"step", "problem"} <= set(inspect.signature(getattr(laws, name)).parameters)
        and not {"zeroing", "macs", "uncut"} & set(name.split("_"))]  # those are of channels


@pytest.fixture
def family() -> Any:
    register(Signs())
    yield Signs.name
    del FAMILIES[Signs.name]


def job() -> Task:
    """Called by name from the command line as well."""
    return task(PROBLEMS["residual"])


def model() -> Network:
    return network(PROBLEMS["residual"])


@pytest.mark.parametrize("problem", NETWORKS)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("test_"))
def test_it_is_held_to_every_law(law: Any, problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(laws.STEPS, "test.SignOfMean", SignOfMean)
    monkeypatch.setitem(laws.DECIDES, SignPlan, lambda plan, net: plan.weights)
    more = {"tmp_path": tmp_path} if "tmp_path" in inspect.signature(law).parameters else {}
    law("test.SignOfMean", problem, **more)


def test_the_laws_are_many() -> None:
    assert len(LAWS) >= 10


def test_a_job_runs_on_the_command_line_and_is_reported(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(
        f'[model]\nfactory = "{__name__}:model"\n[task]\nfactory = "{__name__}:job"\n'
        f'[compress]\nout = "{(tmp_path / "out").as_posix()}"\nseconds = 0.01\n'
        '[[steps]]\nkind = "test.SignOfMean"\nmin_size = 20\n')
    done = CliRunner().invoke(app, ["compress", str(tmp_path / "job.toml")])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["trail"][1]["step"] == "test.SignOfMean"
    assert "signs of" in (tmp_path / "out/report.html").read_text()
    net = fw.load(tmp_path / "out/network.fw")
    assert all(len(net.tensor(n).abs().unique()) <= 2 for n in SignOfMean(20).plan(model(), job()).weights)
    again = fw.Recipe.from_toml(tmp_path / "out/recipe.toml")
    assert again == fw.Recipe([SignOfMean(min_size=20)])


def test_a_wrong_option_is_refused_by_the_recipe() -> None:
    with pytest.raises(fw.errors.RecipeError, match="min_size=-1"):
        fw.Recipe([SignOfMean(min_size=-1)])
    with pytest.raises(fw.errors.RecipeError, match="no option 'minsize'; did you mean 'min_size'"):
        fw.Recipe.from_toml('[[steps]]\nkind = "test.SignOfMean"\nminsize = 3\n')


def test_its_damage_is_measured(family: str) -> None:
    net = model()
    found = fw.sensitivity(net, job(), family)
    assert [s.layer for s in found] == [n.weight for n in select(net).layers]
    assert all(s.damage > 0 for s in found)


def test_mixed_takes_it_where_its_budget_asks_for_it(family: str) -> None:
    net = model()
    step = fw.balance.Mixed(fw.quantize.Quantize(activations=None, ends=None), archive=0.35, kinds=("float",),
                            families=(family,))
    after = step.plan(net, job()).apply(net)
    taken = [n.weight for n in select(net).layers if len(after.tensor(n.weight).abs().unique()) <= 2]
    assert taken
    assert len(taken) < len(select(net).layers) or step.archive < 0.2


def test_its_weights_take_a_bit_each_in_the_archive(tmp_path: Path) -> None:
    net = fw.capture(torch.nn.Linear(256, 256, bias=False), torch.randn(2, 256), parts=False)
    small = SignOfMean().plan(net, Task()).apply(net)
    sizes = []
    for name, one in (("whole", net), ("signs", small)):
        one.save(tmp_path / f"{name}.fw")
        done = CliRunner().invoke(app, ["pack", str(tmp_path / f"{name}.fw"), str(tmp_path / f"{name}.fwz")])
        assert done.exit_code == 0, done.output
        sizes.append((tmp_path / f"{name}.fwz").stat().st_size)
    assert sizes[1] < 256 * 256 / 8 * 1.05 + 1500
    assert sizes[1] * 20 < sizes[0]
