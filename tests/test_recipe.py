"""recipe: order, TOML both ways, compress from end to end, killed and resumed; flags and errors that help."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight import deploy
from featherweight.errors import ExportError, PlanError, RecipeError
from featherweight.measure import Latency, Measurement
from featherweight.recipe import Job, kinds, register
from featherweight.recipe.flags import flags_of
from featherweight.recipe.kinds import line
from featherweight.steps import Context, Fit, Plan, Rewrite, Skipped, Stage

torch.set_num_threads(1)


# ---- steps to play with

@dataclass(frozen=True)
class Spec:
    bits: int = 8
    mode: Literal["up", "down"] = "up"


@dataclass(frozen=True)
class ScalePlan(Plan):
    kind: ClassVar[str] = "test.scale/1"
    name: str
    by: float

    def apply(self, network: fw.Network) -> fw.Network:
        other = network.copy()
        other.set_tensor(self.name, other.tensor(self.name) * self.by)
        return other

    def summary(self) -> str:
        return f"{self.name} times {self.by}"


@dataclass(frozen=True)
class Scale(Rewrite):
    """Multiplies one tensor by a number, or by a random one."""

    name: str = "0.weight"
    by: float | None = 0.5
    ignore: tuple[str, ...] = ()
    spec: Spec | None = None
    table: Mapping[str, Spec] = field(default_factory=dict)
    stage: ClassVar[Stage] = Stage.STRUCTURE
    planned: ClassVar[list[str]] = []

    def plan(self, network: fw.Network, task: fw.Task) -> Plan:
        self.planned.append(self.name)
        by = float(torch.rand(())) if self.by is None else self.by
        return ScalePlan(self.name, by, skipped=(Skipped("2", "not asked for"),))


@dataclass(frozen=True)
class Late(Scale):
    stage: ClassVar[Stage] = Stage.PRECISION


@dataclass(frozen=True)
class GrowPlan(Plan):
    kind: ClassVar[str] = "test.grow/1"

    def apply(self, network: fw.Network) -> fw.Network:
        other = network.copy()
        other.add_tensor("more", torch.ones(100))
        with other.graph.inserting_before(next(iter(other.calls()))):
            node = other.graph.create_node("get_attr", "more")
            total = other.graph.call_function(torch.ops.aten.sum.default, (node,))
        call = other.calls(torch.ops.aten.linear.default)[-1]
        with other.graph.inserting_after(call):
            added = other.graph.call_function(torch.ops.aten.add.Tensor, (call, total))
        call.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
        other.changed()
        return other

    def summary(self) -> str:
        return "more"


@dataclass(frozen=True)
class Grow(Rewrite):
    say: bool = False
    stage: ClassVar[Stage] = Stage.STRUCTURE

    def plan(self, network: fw.Network, task: fw.Task) -> Plan:
        return GrowPlan(grows=("params",) if self.say else ())


@dataclass(frozen=True)
class Nudge(Fit):
    by: float = 1.0

    def fit(self, network: fw.Network, task: fw.Task, context: Context) -> fw.Network:
        assert context.workdir is not None
        assert context.original is not None
        other = network.copy()
        other.set_tensor("0.bias", other.tensor("0.bias") + self.by)
        return other


class Here:
    """A target that deploys to a ``.fw`` file, and runs it here: quick."""

    name, package, suffix = "here", "torch", ".here"

    def export(self, network: fw.Network, path: str | Path) -> int:
        return network.save(path)

    def files(self, path: str | Path) -> tuple[Path, ...]:
        return (Path(path),)

    def load(self, path: str | Path, threads: int = 1, *, like: Any) -> Any:
        return Running(path)


class Running:
    versions: ClassVar[dict[str, str]] = {"here": "1"}
    precision, exact_sums = "f32", True

    def __init__(self, path: str | Path) -> None:
        self.network = fw.load(path, types={f"{Out.__module__}.Out": Out})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.network(*args, **kwargs)

    def close(self) -> None: ...


deploy.register(Here())
for cls in (Scale, Late, Grow, Nudge):
    register(f"test.{cls.__name__}", cls)


# ---- recipes

def test_stages_out_of_order_are_refused_with_a_recipe_that_is_in_order() -> None:
    steps = [Nudge(), Late(), Nudge(2.0), fw.prune.Weights(sparsity=0.5), Scale(), Nudge(3.0)]
    with pytest.raises(RecipeError, match="comes after") as caught:
        fw.Recipe(steps)
    text = str(caught.value)
    assert "(sparsity) comes after Late() (precision)" in text
    written = text[text.index("fw.Recipe("):]
    mended = eval(written, {"fw": fw, **{c.__name__: c for c in (Scale, Late, Nudge)}})
    assert list(mended.steps) == [Nudge(), Scale(), Nudge(3.0), fw.prune.Weights(sparsity=0.5), Late(), Nudge(2.0)]


def test_rewrites_inside_a_training_count_too() -> None:
    fw.Recipe([fw.recover.Train(during=(fw.prune.Weights(),)), Late(), fw.recover.BatchNorm()])
    with pytest.raises(RecipeError, match=r"Weights\(\) \(sparsity\) comes after"):
        fw.Recipe([Late(), fw.recover.Train(during=(fw.prune.Weights(),))])


def test_training_after_quantization_is_refused() -> None:
    if "quantize.Quantize" not in kinds():
        pytest.skip("no quantize.Quantize yet")
    steps = [fw.prune.Channels(macs=0.5), fw.quantize.Quantize(), fw.recover.Train(epochs=2)]
    with pytest.raises(RecipeError, match="integers, not to be trained") as caught:
        fw.Recipe(steps)
    written = str(caught.value).partition("write\n")[2].partition("\nor put")[0]
    assert list(eval(written, {"fw": fw}).steps) == [steps[0], steps[2], steps[1]]


def test_options_are_checked_in_python_and_in_toml_alike() -> None:
    recipe = fw.Recipe([Scale(ignore=["a"], spec={"bits": 4, "mode": "down"})])  # type: ignore[arg-type]
    assert recipe.steps == (Scale(ignore=("a",), spec=Spec(4, "down")),)
    for text, python, match in (
        ('kind = "test.Scale"\nby = "much"', lambda: Scale(by="much"), r"test\.Scale: by is 'much'.*number"),
        ('kind = "recover.Train"\noptimizer = "adam"',
         lambda: fw.recover.Train(optimizer="adam"), "did you mean 'adamw'"),
        ('kind = "recover.Train"\ndistill = 3', lambda: fw.recover.Train(distill=3), "expected an objective"),
        ('kind = "recover.Train"\nduring = [1]',
         lambda: fw.recover.Train(during=(1,)), "during is .*instance of Rewrite"),
        ('kind = "recover.Train"\nlr = -1', lambda: fw.recover.Train(lr=-1), "above 0"),
        ('kind = "recover.Train"\ndistill = {kind = "distill.Logits", temperature = "hot"}',
         lambda: fw.recover.Train(distill=fw.distill.Logits(temperature="hot")), "temperature is 'hot'"),
    ):
        with pytest.raises(RecipeError, match=match):
            fw.Recipe.from_toml(f"[[steps]]\n{text}\n")
        with pytest.raises(RecipeError, match=match):
            fw.Recipe([python()])


@pytest.mark.parametrize(("text", "match"), [
    ('[[steps]]\nkind = "prune.Channel"\n', r"step 1: unknown kind 'prune\.Channel'; did you mean 'prune\.Channels'"),
    ('[[steps]]\nkind = "prune.Channels"\nmac = 0.5\n', r"prune\.Channels has no option 'mac'; did you mean 'macs'"),
    ('[[steps]]\nkind = "test.Scale"\nspec = {bit = 3}\n', r"Scale: spec has no option 'bit'; did you mean 'bits'"),
    ('[[steps]]\nkind = "test.Scale"\ntable = {a = {bit = 3}}\n', "did you mean 'bits'"),
    ("[[steps]]\nmacs = 0.5\n", "without kind"),
    ("[[step]]\nmacs = 0.5\n", "did you mean 'steps'"),
    ("steps = 3\n", "no list of tables"),
    ("[[steps]\n", "is no TOML"),
    ("missing.toml", "no such recipe"),
])
def test_wrong_toml_is_answered_with_what_was_meant(text: str, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        fw.Recipe.from_toml(text)


def test_python_mistakes_are_answered_too() -> None:
    with pytest.raises(RecipeError, match=r"write fw\.Recipe\(\[Scale\(\)\]\)"):
        fw.Recipe(Scale())  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="expected frozen dataclasses"):
        fw.Recipe(["prune"])  # type: ignore[list-item]
    with pytest.raises(RecipeError, match=r"write fw\.recover\.Train\(distill="):
        fw.Recipe([fw.distill.Logits()])  # type: ignore[list-item]
    with pytest.raises(RecipeError, match="is no frozen dataclass"):
        register("a.b", int)


def test_toml_round_trip(tmp_path: Path) -> None:
    recipe = fw.Recipe([
        Scale(name='odd "name" \\ \n ä \x7f', by=None, ignore=("a*", "b"), spec=Spec(4, "down"),
              table={"x y": Spec(2)}),
        fw.prune.Channels(macs=0.5, ignore=("head",)),
        fw.factorize.LowRank(energy=0.9, ranks={"layer.0": 3}),
        fw.recover.Train(epochs=3, lr=1e-4, optimizer="adamw", distill=fw.distill.Logits(temperature=2.0),
                         during=(fw.prune.Weights(sparsity=0.9),), clip=1.0, checkpoint_every=30.0),
        fw.recover.BatchNorm(batches=None),
    ])
    text = recipe.to_toml()
    assert fw.Recipe.from_toml(text) == recipe
    (tmp_path / "recipe.toml").write_text(text)
    assert fw.Recipe.from_toml(tmp_path / "recipe.toml") == fw.Recipe.from_toml(str(tmp_path / "recipe.toml")) == recipe
    assert eval(str(fw.Recipe(recipe.steps[1:])), {"fw": fw}) == fw.Recipe(recipe.steps[1:])


@pytest.mark.parametrize("kind", sorted(k for k in kinds() if not k.startswith(("distill", "test"))))
def test_every_shipped_step_survives_toml_with_its_defaults(kind: str) -> None:
    required = {"prune.Channels": {"macs": 0.5}}
    try:
        step = kinds()[kind](**required.get(kind, {}))
        recipe = fw.Recipe([step])
    except (TypeError, RecipeError) as error:
        pytest.skip(f"needs options: {error}")
    assert fw.Recipe.from_toml(recipe.to_toml()) == fw.Recipe.from_toml(recipe.to_toml(complete=True)) == recipe
    for f in fields(step):
        assert f"\n{f.name} = " in recipe.to_toml(complete=True), "another version's defaults change nothing"
    assert line(step).startswith(f"fw.{kind}(")


def test_what_toml_cannot_hold_is_said() -> None:
    network = tiny()
    with pytest.raises(RecipeError, match="path of a saved one"):
        fw.Recipe([fw.recover.Train(distill=fw.distill.Logits(teacher=network))]).to_toml()

    @dataclass(frozen=True)
    class Mine(Nudge):
        pass

    with pytest.raises(RecipeError, match=r"fw\.recipe\.register\('mine\.Mine', Mine\)"):
        fw.Recipe([Mine()]).to_toml()


# ---- compress

def tiny(seed: int = 0) -> fw.Network:
    torch.manual_seed(seed)
    return fw.capture(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(2, 4))


def batches(seed: int, count: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(16, 4, generator=g)
        yield x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def task(**more: Any) -> fw.Task:
    return fw.Task(**{"train": lambda: batches(1, 6), "calibration": lambda: batches(2),
                      "validation": lambda: batches(3), "loss": nn.functional.cross_entropy, "score": fw.scores.top1,
                      "score_name": "top1", **more})


RECIPE = fw.Recipe([Scale(by=None), fw.recover.Train(epochs=2, lr=0.05, distill=fw.distill.Logits()),
                    fw.prune.Weights(sparsity=0.5),
                    fw.recover.Train(epochs=1, during=(fw.prune.Weights(sparsity=0.75),))])


def assert_same(a: fw.Network, b: fw.Network) -> None:
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor, b.tensor(name)), name
    assert a.patterns == b.patterns


def test_from_end_to_end(tmp_path: Path) -> None:
    network, told = tiny(), []
    before = network.copy()
    read = []

    def test() -> Iterator[tuple[Tensor, Tensor]]:
        read.append(len(told))
        return batches(4)

    result = fw.compress(network, task(test=test), RECIPE, out=tmp_path, seconds=0.05,
                         progress=lambda *a: told.append(a))
    assert_same(network, before)
    assert [m.step for m in result.trail] == ["original", "test.Scale", "recover.Train", "prune.Weights",
                                              "recover.Train"]
    assert all(m.split == "validation" and m.latency and m.agreement and m.agreement.ok for m in result.trail)
    assert result.final is not None
    assert (result.final.before.split, result.final.after.split) == ("test", "test")
    assert result.final.after.step == "compressed"
    last = max(i for i, t in enumerate(told) if t[0] == "measured recover.Train")
    assert min(read) == last + 2, "the test split is read after all else"
    assert [(d.step, d.kind) for d in result.plans] == [(1, "test.Scale"), (3, "prune.Weights"), (4, "prune.Weights")]
    assert result.plans[0].skipped == (Skipped("2", "not asked for"),)
    weights = torch.cat([result.network.tensor(f"{i}.weight").flatten() for i in (0, 2)])
    assert float((weights == 0).float().mean()) == pytest.approx(0.75, abs=0.02)
    files = {p.name for p in tmp_path.iterdir()}
    assert {"model.onnx", "network.fw", "network.fwz", "result.json", "recipe.toml", "state"} <= files
    values = json.loads((tmp_path / "result.json").read_text())
    assert values["format"] == 1
    assert [m["params"] for m in values["trail"]] == [m.params for m in result.trail]
    assert values["recipe"][1] == {"kind": "recover.Train", "epochs": 2, "lr": 0.05,
                                   "distill": {"kind": "distill.Logits"}}
    assert {"final", "plans", "layers", "notes", "flags", "machine", "versions", "recipe_toml"} <= values.keys()
    assert fw.Recipe.from_toml(tmp_path / "recipe.toml") == RECIPE
    assert_same(fw.load(tmp_path / "network.fw"), result.network)
    assert not list(tmp_path.rglob("*.part")), "nothing half written is left"
    steps = [t for t in told if t[0].startswith("step ")]
    assert [(t[0], t[1], t[2]) for t in steps] == [
        ("step 1: test.Scale", 0, 4), ("step 2: recover.Train", 1, 4), ("step 3: prune.Weights", 2, 4),
        ("step 4: recover.Train", 3, 4)]
    assert any(t[0] == "recover.Train" and t[3]["loss"] > 0 for t in told)


def squeeze(network: fw.Network, task: fw.Task, recipe: Any, **more: Any) -> fw.Result:
    return fw.compress(network, task, recipe, **{"target": "here", "seconds": 0.02, **more})


class Killed(Exception):
    pass


def first_two(seed: int, count: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches by which a split is known, and no more."""
    yield from itertools.islice(batches(seed, count), 2)
    raise AssertionError("the data is not read again")


def test_killed_anywhere_it_resumes_in_the_step_it_was_in(tmp_path: Path) -> None:
    whole = squeeze(tiny(), task(), RECIPE, seed=3)
    unread: list[bool] = []

    def given(seed: int, count: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
        return first_two(seed, count) if unread else batches(seed, count)

    same = task(train=lambda: given(1, 6), calibration=lambda: given(2), validation=lambda: given(3))

    def kill(what: str, done: float, total: float, figures: Mapping[str, float]) -> None:
        if (what, done) == ("recover.Train", 9):
            raise Killed

    Scale.planned.clear()
    with pytest.raises(Killed):
        squeeze(tiny(), same, RECIPE, out=tmp_path, seed=3, progress=kill)
    told: list[Any] = []

    def listen(what: str, done: float, total: float, figures: Mapping[str, float]) -> None:
        told.append((what, done))
        if what == "measured prune.Weights":
            raise Killed

    with pytest.raises(Killed):
        squeeze(tiny(), same, RECIPE, out=tmp_path, seed=3, progress=listen)
    assert told[0] == ("step 2: recover.Train", 1)
    assert next(t for t in told if t[0] == "recover.Train") == ("recover.Train", 7), "went on after the first epoch"
    resumed = squeeze(tiny(), same, RECIPE, out=tmp_path, seed=3)
    assert Scale.planned == ["0.weight"], "planned once"
    assert_same(resumed.network, whole.network)
    assert [d.to_dict() | {"seconds": 0} for d in resumed.plans] == [d.to_dict() | {"seconds": 0} for d in whole.plans]
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "state").rglob("*") if p.is_file()}
    unread.append(True)
    again = squeeze(tiny(), same, RECIPE, out=tmp_path, seed=3)
    assert again.trail == resumed.trail
    assert again.to_dict()["plans"] == resumed.to_dict()["plans"]
    assert_same(again.network, whole.network)
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "state").rglob("*") if p.is_file()}


def test_another_job_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    one = fw.Recipe([Scale()])
    squeeze(tiny(), task(), one, out=tmp_path)
    with pytest.raises(RecipeError, match=r"another job \(other: recipe\).*resume=False"):
        squeeze(tiny(), task(), [Scale(by=0.25)], out=tmp_path)
    with pytest.raises(RecipeError, match=r"other: network, seed"):
        squeeze(tiny(1), task(), one, out=tmp_path, seed=1)
    result = squeeze(tiny(), task(), [Scale(by=0.25)], out=tmp_path, resume=False)
    assert torch.equal(result.network.tensor("0.weight"), 0.25 * tiny().tensor("0.weight"))
    other = tmp_path / "other"
    (other / "state").mkdir(parents=True)
    (other / "state" / "holiday.txt").write_text("keep")
    with pytest.raises(RecipeError, match="no state of a job"):
        squeeze(tiny(), task(), one, out=other, resume=False)


def test_a_step_that_breaks_its_word_is_an_error_and_one_that_says_so_is_not() -> None:
    with pytest.raises(PlanError, match=r"step 1 \(test\.Grow\) grew the network from 131 to 231 parameters"):
        squeeze(tiny(), task(), [Grow()])
    result = squeeze(tiny(), task(), [Grow(say=True), Scale(by=1.0)])
    assert any("step 1 (test.Grow) made the deployed file larger" in f for f in result.flags)
    assert "step 2 (test.Scale) changed nothing" in result.flags


def test_flags_weigh_what_was_timed_in_the_same_rounds() -> None:
    old = Measurement("a", 1, 1, 1, (), 10, 10, latency=Latency(1.0, 0.9, 1.1, 9))
    new = replace(old, latency=Latency(2.0, 1.9, 2.1, 9))
    assert "made it slower: 1 s -> 2 s" in flags_of(1, Scale(), [], old, new, False)[0]
    assert flags_of(1, Scale(), [], old, replace(new, beside={"before": Latency(1.99, 1.9, 2.1, 9)}), False) == []
    noisy = replace(old, latency=Latency(1.2, 0.93, 1.9, 9))
    assert flags_of(1, Scale(), [], old, noisy, False) == [], "a disturbance moved the upper half only"
    assert flags_of(1, Nudge(), [], old, new, False) == [], "a Fit leaves the graph as it was"


@pytest.mark.parametrize("saturates", [True, False])
def test_sums_that_may_saturate_are_told(saturates: bool) -> None:
    old = Measurement("a", 1, 1, 1, (), 10, 10)
    new = replace(old, agreement=deploy.Agreement(1.0, 0.4, False, 5e-2, saturates))
    (found,) = flags_of(1, Scale(), [], old, new, False)
    assert "differs from PyTorch by 0.4" in found
    assert ("weights='int7', ends=None" in found) == saturates


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Out:
        return Out(self.a(x), x)


@dataclass
class Out:
    logits: Tensor
    given: Tensor


def test_named_outputs_stay_what_they_were_between_steps() -> None:
    network = fw.capture(Named(), torch.randn(2, 4))
    result = squeeze(network, task(score=None, loss=lambda o, t: nn.functional.cross_entropy(o.logits, t)),
                         [Scale("a.weight"), fw.recover.Train(lr=0.1)])
    assert isinstance(result.network(torch.randn(2, 4)), Out)


def test_what_cannot_be_compressed_is_said() -> None:
    with pytest.raises(RecipeError, match=r"not a Linear; compress fw\.capture"):
        fw.compress(nn.Linear(2, 2), task(), [])  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="did you mean 'onnxruntime'"):
        fw.compress(tiny(), task(), [], target="onnxruntim")


def test_a_task_with_nothing_but_calibration_will_do() -> None:
    result = squeeze(tiny(), fw.Task(calibration=lambda: batches(2)), [Scale()])
    assert [m.score for m in result.trail] == [None, None]
    assert result.final is None
    assert result.to_dict()["final"] is None


# ---- jobs

MODULE = """
import torch, featherweight as fw
from torch import nn
def model(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
def task(count=3):
    def batches():
        g = torch.Generator().manual_seed(1)
        for _ in range(count):
            x = torch.randn(16, 4, generator=g)
            yield x, (x[:, 0] > 0).long()
    return fw.Task(train=batches, calibration=batches, validation=batches, loss=nn.functional.cross_entropy,
                   score=fw.scores.top1, score_name="top1")
def neither():
    return 3
"""
JOB = """
[model]
factory = "job_of_tests:model"
arguments = {{width = 12}}
[task]
factory = "job_of_tests:task"
arguments = {{count = 2}}
[compress]
out = "{out}"
target = "here"
seconds = 0.02
[[steps]]
kind = "prune.Weights"
sparsity = 0.5
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:

    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "job_of_tests.py").write_text(MODULE)
    (tmp_path / "job.toml").write_text(JOB.format(out=tmp_path / "out"))
    sys.modules.pop("job_of_tests", None)
    return tmp_path / "job.toml"


def test_a_job_from_toml(job: Path) -> None:
    found = Job.from_toml(job)
    result = found.run()
    assert result.network.tensor("0.weight").shape == (12, 4)
    out = job.parent / "out"
    assert (out / "model.here").exists()
    again = Job.from_toml((out / "recipe.toml").read_text())
    assert again.options.out == f"{found.options.out}-again", "it computes all anew"
    assert replace(again, options=replace(again.options, out=found.options.out)).to_toml() == found.to_toml()
    by_file = Job.from_toml(f'[model]\nfile = "{out}/network.fw"\n[task]\nfactory = "job_of_tests:task"\n')
    network, _ = by_file.prepare()
    assert_same(network, result.network)


@pytest.mark.parametrize(("old", "new", "match"), [
    ("job_of_tests:model", "job_of_test:model", "there is no module 'job_of_test'"),
    ("job_of_tests:model", "job_of_tests:modle", "has no function 'modle'"),
    ("job_of_tests:model", "job_of_tests", "expected module:function"),
    ("job_of_tests:task", "job_of_tests:neither", "called with|gave a int"),
    ("width = 12", "wide = 12", "unexpected keyword argument 'wide'"),
    ("[model]", "[modell]", "did you mean 'model'"),
    ("out =", "outt =", r"\[compress\] has no option 'outt'; did you mean 'out'"),
    ('factory = "job_of_tests:task"', "", r"\[task\] lacks factory"),
    ('factory = "job_of_tests:model"', 'factory = "a:b"\nfile = "c"', "one of the two"),
])
def test_wrong_jobs_are_answered_clearly(job: Path, old: str, new: str, match: str) -> None:
    job.write_text(job.read_text().replace(old, new))
    with pytest.raises(RecipeError, match=match):
        Job.from_toml(job).run()
