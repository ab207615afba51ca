"""Several companions beside one training: their terms add up, their plans are joined, a resumed run goes on alike."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight.distill import Logits
from featherweight.distill.logits import divergence
from featherweight.errors import PlanError, RecipeError, TaskError
from featherweight.factorize import LowRank
from featherweight.measure.macs import macs
from featherweight.network.file.digest import digest
from featherweight.prune import Channels, Weights, axis_groups
from featherweight.prune.channels.plan import ChannelPlan
from featherweight.quantize import Quantize
from featherweight.quantize.plan import QuantizePlan
from featherweight.recover import Train
from featherweight.recover.companions import Companions
from featherweight.steps import Companion, Context, Plan, Rewrite, Stage
from featherweight.steps.joined import joined, narrowed, widened
from featherweight.task import call
from problems import PROBLEMS, network, task, tensors_of

torch.set_num_threads(1)
COARSE = {"frequency": 0.2}
REWRITES: dict[str, Rewrite] = {
    "channels": Channels(macs=0.6, **COARSE),
    "channels growing": Channels(ratio=0.7, schedule="growing", end=0.5, **COARSE),
    "weights": Weights(sparsity=0.7, **COARSE),
    "weights surgery": Weights(sparsity=0.7, regrow="surgery", end=0.4, **COARSE),
    "weights 2:4": Weights(pattern="2:4", **COARSE),
    "weights wanda": Weights(sparsity=0.6, score="wanda", **COARSE),
    "quantize": Quantize(),
    "quantize few bits": Quantize("int4", "uint4", progressive=("int8/uint8",)),
    "quantize ternary": Quantize("ternary", "uint4", learn="ttq", ends=None),
    "low rank": LowRank(energy=0.8),
}
PAIRS = [("channels", "weights"), ("channels", "quantize"), ("weights", "quantize"),
         ("channels growing", "weights 2:4"), ("channels growing", "quantize ternary"),
         ("weights surgery", "channels"), ("weights wanda", "channels"), ("weights surgery", "quantize few bits"),
         ("channels growing", "quantize few bits")]
FAMILIES = ["mlp", "residual", "attention"]
fit = Train(epochs=2, lr=0.01)


def outputs(net: fw.Network, problem: str) -> list[Tensor]:
    row = PROBLEMS[problem]
    with torch.no_grad():
        return tensors_of(call(net, row.example(row.batch or 6, seed=77)))


def assert_close(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-5) -> None:
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * max(1.0, float(y.abs().max())))


def run(step: Train, problem: str, patch: pytest.MonkeyPatch, folder: Path | None = None
        ) -> tuple[fw.Network, list[Tensor]]:
    """The finished network, and what the network in training gave at its end, taps and all."""
    seen: list[list[Tensor]] = []
    plain = Companions.finish

    def finish(self: Companions, origin: fw.Network) -> Any:
        seen.append(outputs(self.network.eval(), problem))
        return plain(self, origin)

    net = network(PROBLEMS[problem])
    with patch.context() as patched:
        patched.setattr(Companions, "finish", finish)
        return step.fit(net, task(PROBLEMS[problem]), Context(original=net, workdir=folder)), seen[-1]


# ---- pairs of rewrites

@pytest.mark.parametrize(("one", "other", "problem"), [
    *((*pair, problem) for pair in PAIRS[:3] for problem in FAMILIES), *((*pair, "residual") for pair in PAIRS[3:])])
def test_every_pair_trains_and_finishes_in_both_orders(one: str, other: str, problem: str,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """The finished network is the one that trained, and as small, sparse and coarse as was asked for."""
    results = []
    for pair in ((one, other), (other, one)):
        step = dataclasses.replace(fit, beside=tuple(REWRITES[name] for name in pair))
        result, wanted = run(step, problem, monkeypatch)
        assert_close(outputs(result, problem), wanted)
        results.append(result)
    assert digest(results[0]) == digest(results[1])
    for rewrite in (REWRITES[one], REWRITES[other]):
        CHECKS[type(rewrite)](rewrite, results[0], network(PROBLEMS[problem]))


def check_channels(step: Any, result: fw.Network, origin: fw.Network) -> None:
    share = macs(result).total / macs(origin).total
    assert share == pytest.approx(0.6, abs=0.05) if step.macs is not None else 0.4 < share < 0.75


def check_weights(step: Any, result: fw.Network, origin: fw.Network) -> None:
    """Zeros among what is left, not among what was there."""
    masked = {name for name in result.patterns if name in origin.tensors()}
    assert masked
    assert set(result.patterns.values()) == {step.pattern}
    zeros = sum(int((result.tensor(n) == 0).sum()) for n in masked)
    total = sum(result.tensor(n).numel() for n in masked)
    if step.pattern == "single":
        assert zeros / total == pytest.approx(step.sparsity, abs=0.01)
        return
    for name in masked:
        rows = result.tensor(name).flatten(1)
        groups = rows[:, :rows.shape[1] // 4 * 4].unflatten(1, (-1, 4))
        assert bool(((groups == 0).sum(-1) >= 2).all()), name


def check_quantize(step: Any, result: fw.Network, origin: fw.Network) -> None:
    kinds = [t.dtype for n, t in result.tensors().items() if n in origin.tensors() and origin.tensor(n).dim() > 1]
    assert torch.int8 in kinds
    assert any("quantize_per_tensor" in str(n.target) for n in result.calls())


CHECKS: dict[type, Callable[[Any, fw.Network, fw.Network], None]] = {
    Channels: check_channels, Weights: check_weights, Quantize: check_quantize}


def test_all_three_at_once_with_a_teacher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    net = network(PROBLEMS["residual"])
    things = (Quantize(), Logits(temperature=2.0), Weights(sparsity=0.7, **COARSE), Channels(macs=0.6, **COARSE))
    results = []
    for i, order in enumerate((things, things[::-1])):
        result, wanted = run(dataclasses.replace(fit, beside=order), "residual", monkeypatch, tmp_path / str(i))
        assert_close(outputs(result, "residual"), wanted)
        results.append(result)
    assert digest(results[0]) == digest(results[1])
    for step in (things[0], *things[2:]):
        CHECKS[type(step)](step, results[0], net)
    saved = {p.name: type(Plan.load(p)).__name__ for p in (tmp_path / "0").glob("*.plan")}
    assert saved == {"during_0.plan": "QuantizePlan", "during_2.plan": "WeightPlan", "during_3.plan": "ChannelPlan"}
    plans = [Plan.load(tmp_path / "0" / f"during_{i}.plan") for i in (3, 2, 0)]
    masks = plans[1].masks()  # type: ignore[attr-defined]
    assert {n: m.shape for n, m in masks.items()} == {n: results[0].tensor(n).shape for n in masks}
    results[0].save(tmp_path / "net.fw")
    assert digest(fw.load(tmp_path / "net.fw")) == digest(results[0])


class Killed(Exception):
    pass


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_killed_pair_goes_on_alike(one: str, other: str, tmp_path: Path) -> None:
    """Killed in the middle and taken up in a fresh process's place: the same file, bit for bit."""
    row = PROBLEMS["residual"]
    step = dataclasses.replace(fit, epochs=3, checkpoint_every=0.0, beside=(REWRITES[one], REWRITES[other]))

    def kill(what: str, done: float, total: float, figures: Any) -> None:
        if done == 6:
            raise Killed("at step 6")

    with pytest.raises(Killed, match="at step 6"):
        step.fit(network(row), task(row), Context(workdir=tmp_path, progress=kill))
    told: list[float] = []
    resumed = step.fit(network(row), task(row), Context(
        workdir=tmp_path, progress=lambda what, done, total, figures: told.append(done)))
    assert told[0] == 6
    assert digest(resumed) == digest(step.fit(network(row), task(row), Context()))


# ---- refused before the first batch

def untouched() -> Iterator[Any]:
    raise AssertionError("a batch was drawn")
    yield


@pytest.mark.parametrize(("beside", "message"), [
    ((REWRITES["low rank"], REWRITES["weights"]), r"LowRank cannot be used during training.*step of its own"),
    ((REWRITES["weights"], REWRITES["low rank"]), r"LowRank cannot be used during training"),
    ((REWRITES["channels"], REWRITES["low rank"]), r"LowRank cannot be used during training"),
    ((REWRITES["low rank"], REWRITES["quantize"]), r"LowRank cannot be used during training"),
    ((Channels(macs=0.6), Channels(ratio=0.5, ignore=("fc",))), r"two plans cut channels.*write one prune\.Channels"),
    ((Quantize(), Quantize("int4")), r"quantized once; write one quantize\.Quantize\(mixed="),
    ((Quantize("binary", None, ends=None), Weights(0.5)),
     r"prune\.Weights and quantize\.Quantize cannot work in one training|quantize\.Quantize and prune\.Weights .*zeros "
     r"of 'stem\.0\.weight' have no place among the levels of binary; write Quantize\(mixed="),
])
def test_what_cannot_work_together_is_refused_in_words(beside: tuple[Any, ...], message: str) -> None:
    row = PROBLEMS["residual"]
    work = dataclasses.replace(task(row), train=untouched)
    for order in (beside, beside[::-1]):
        with pytest.raises(RecipeError, match=message):
            dataclasses.replace(fit, beside=order).fit(network(row), work, Context())


def test_two_masks_of_different_layers_work_together() -> None:
    row = PROBLEMS["mlp"]
    result = dataclasses.replace(fit, beside=(Weights(0.5, ignore=("0", "2")), Weights(0.8, ignore=("4",)))).fit(
        network(row), task(row), Context())
    shares = {n: float((result.tensor(f"{n}.weight") == 0).float().mean()) for n in ("0", "2", "4")}
    assert shares["4"] == pytest.approx(0.5, abs=0.01)
    sizes = {n: result.tensor(f"{n}.weight").numel() for n in ("0", "2")}
    zeros = sum(shares[n] * size for n, size in sizes.items())
    assert zeros / sum(sizes.values()) == pytest.approx(0.8, abs=0.01)


# ---- plans carried through plans

@pytest.mark.parametrize("problem", ["mlp", "residual", "grouped", "attention", "shuffle", "tied"])
def test_what_a_cut_keeps_is_what_the_cut_network_holds(problem: str) -> None:
    net = network(PROBLEMS[problem])
    plan = Channels(macs=0.5).plan(net, fw.Task())
    small, kept = plan.apply(net), plan.kept(net)
    assert kept
    assert {n for n, t in net.tensors().items() if n in small.tensors() and t.shape != small.tensor(n).shape} == {
        n for n in kept if n in small.tensors()}
    for name in set(net.tensors()) & set(small.tensors()):
        assert torch.equal(narrowed(net.tensor(name), kept.get(name, ())), small.tensor(name)), name


def test_narrow_and_wide_are_each_others_way_back() -> None:
    whole, kept = torch.arange(60.0).view(3, 4, 5), (None, torch.tensor([0, 2]), torch.tensor([4, 1, 0]))
    small = narrowed(whole, kept)
    assert torch.equal(small, torch.stack([torch.stack([torch.stack([whole[i, j, k] for k in (4, 1, 0)])
                                                        for j in (0, 2)]) for i in range(3)]))
    assert torch.equal(widened(small, kept, whole), whole)
    changed = widened(-small, kept, whole)
    assert torch.equal(narrowed(changed, kept), -small)
    assert torch.equal(changed[:, 1], whole[:, 1])


def test_plans_made_on_one_network_are_applied_one_after_another() -> None:
    """Cut and masked as planned: the same as masking first and cutting what came out."""
    net = network(PROBLEMS["residual"])
    cut, mask = Channels(macs=0.5).plan(net, fw.Task()), Weights(0.5).plan(net, fw.Task())
    done, result = joined([cut, mask], net)
    assert [type(p).__name__ for p in done] == ["ChannelPlan", "WeightPlan"]
    other = cut.apply(mask.apply(net))
    assert all(torch.equal(t, other.tensor(n)) for n, t in result.tensors().items())
    assert result.patterns == other.patterns
    assert done[1].zeros == {n: int((result.tensor(n) == 0).sum()) for n in done[1].zeros}  # type: ignore[attr-defined]
    with pytest.raises(PlanError, match="make the plan on this very network"):
        mask.apply(cut.apply(net))


def test_a_grouped_convolution_that_picks_its_input_reads_it_rounded() -> None:
    """A cut puts a choice of channels between the network's input and the convolution; rounding comes before it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                          nn.Flatten(), nn.Linear(8 * 16, 3))
    x = torch.randn(8, 4, 6, 6)
    net = fw.capture(model.eval(), x)
    work = fw.Task(train=lambda: [(x, torch.zeros(8, dtype=torch.long))], calibration=lambda: [(x, None)],
                   loss=F.cross_entropy)
    result = Train(epochs=2, lr=0.01, beside=(Channels(ratio=0.4, **COARSE), Quantize())).fit(net, work, Context())
    picked = result.calls(torch.ops.aten.index_select.default)
    assert picked
    assert all("dequantize" in str(n.args[0].target) for n in picked)


# ---- terms

@dataclass(frozen=True)
class Small:
    """A penalty on the size of the outputs; ``share`` of the task's loss is left."""

    by: float = 0.1
    share: float = 1.0

    def start(self, network: fw.Network, task: fw.Task, context: Context) -> Companion:
        return Size(self)


class Size(Companion):
    def __init__(self, options: Small) -> None:
        self.options = options

    @property
    def task_weight(self) -> float:
        return self.options.share

    def loss(self, inputs: Any, output: Any, target: Any) -> Tensor:
        return self.options.by * output.square().mean()


def classes() -> tuple[fw.Network, fw.Network, Tensor, Tensor]:
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        nets.append(fw.capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4)))
    return nets[0], nets[1], torch.randn(32, 4), torch.randint(0, 3, (32,))


def test_the_loss_is_the_tasks_times_all_factors_plus_all_terms() -> None:
    student, teacher, x, y = classes()
    things = (Logits(temperature=2.0, weight=0.75), Small(0.5, share=0.5), Logits(temperature=1.0, weight=0.2))
    companions = Companions(things, student, fw.Task(loss=F.cross_entropy), Context(original=teacher))
    output = student(x)
    terms = companions.terms(x, output, y)
    wanted = {"task": 0.25 * 0.5 * 0.8 * F.cross_entropy(output, y),
              "distill.Logits": 0.75 * divergence(output, teacher(x), 2.0),
              "test_companions.Small": 0.5 * output.square().mean(),
              "distill.Logits 2": 0.2 * divergence(output, teacher(x), 1.0)}
    assert terms.keys() == wanted.keys()
    torch.testing.assert_close(dict(terms), wanted)


def test_a_teacher_alone_gives_the_numbers_that_it_always_gave() -> None:
    """The loss as version 0.1 wrote it, in a loop that anybody would write."""
    student, teacher, x, y = classes()
    batches = list(zip(x.split(8), y.split(8), strict=True))
    work = fw.Task(train=lambda: batches, loss=F.cross_entropy)
    options = {"epochs": 2, "lr": 0.05, "schedule": "constant", "weight_decay": 0.0}
    spelled = [Train(**options, **given).fit(student, work, Context(original=teacher)) for given in (
        {"distill": Logits(temperature=3.0)}, {"beside": (Logits(temperature=3.0),)})]
    assert digest(spelled[0]) == digest(spelled[1])
    own = student.copy().train()
    optimizer = torch.optim.SGD(own.parameters(), lr=0.05, momentum=0.9)
    for a, b in batches * 2:
        output = own(a)
        with torch.no_grad():
            wanted = teacher(a)
        (0.9 * divergence(output, wanted, 3.0) + (1 - 0.9) * F.cross_entropy(output, b)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in own.tensors().items():
        assert torch.equal(tensor, spelled[0].tensor(name)), name


def test_the_terms_are_told_and_sum_to_the_loss() -> None:
    student, teacher, x, y = classes()
    told: list[dict[str, float]] = []
    work = fw.Task(train=lambda: [(x, y)] * 3, loss=F.cross_entropy)
    Train(epochs=2, beside=(Small(), Weights(0.5)), distill=Logits()).fit(student, work, Context(
        original=teacher, progress=lambda what, done, total, figures: told.append(dict(figures))))
    assert len(told) == 6
    for figures in told:
        assert figures.keys() == {"loss", "images_per_s", "task", "test_companions.Small", "distill.Logits"}
        assert sum(v for k, v in figures.items() if k not in ("loss", "images_per_s")) == pytest.approx(figures["loss"])
    plain: list[dict[str, float]] = []
    Train().fit(student, work, Context(progress=lambda what, done, total, figures: plain.append(dict(figures))))
    assert {"loss", "images_per_s"} == plain[0].keys()


def test_a_loss_that_nobody_gives_is_asked_for() -> None:
    student, teacher, x, _ = classes()
    work = fw.Task(train=lambda: [(x, None)])
    with pytest.raises(RecipeError, match=r"distill\.Logits mixes in the task's loss .*write Logits\(weight=1\.0\)"):
        Train(beside=(Small(), Logits())).fit(student, work, Context(original=teacher))
    with pytest.raises(TaskError, match="no target and so no loss"):
        Train(beside=(Small(),)).fit(student, work, Context())
    with pytest.raises(TaskError, match="needs the task's loss"):
        Train(beside=(Weights(0.5),)).fit(student, work, Context())
    trained = Train(lr=0.1, beside=(Small(), Logits(weight=1.0))).fit(student, work, Context(original=teacher))
    assert digest(trained) != digest(student)


# ---- the signatures of version 0.1

@dataclass(frozen=True)
class Old:
    """An objective as version 0.1 knew it."""

    def begin(self, network: fw.Network, context: Context) -> Any:
        return OldCriterion()


class OldCriterion:
    closed: ClassVar[int] = 0

    def __call__(self, inputs: Any, output: Any, target: Any, loss: Tensor | None) -> Tensor:
        return 2 * loss + output.square().mean() if loss is not None else output.square().mean()

    def close(self) -> None:
        OldCriterion.closed += 1


@dataclass(frozen=True)
class OldRewrite(Rewrite):
    """A rewrite whose start takes no context."""

    stage: ClassVar[Stage] = Stage.SPARSITY

    def plan(self, network: fw.Network, task: fw.Task) -> Plan:
        return Weights(0.5).plan(network, task)

    def start(self, network: fw.Network, task: fw.Task) -> Companion:  # type: ignore[override]
        return Weights(0.5).start(network, task)


def test_old_objectives_and_rewrites_are_taken() -> None:
    student, _, x, y = classes()
    work = fw.Task(train=lambda: [(x, y)], loss=F.cross_entropy)
    before = OldCriterion.closed
    trained = Train(lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant", distill=Old()).fit(
        student, work, Context())
    assert OldCriterion.closed == before + 1
    copy = student.copy()
    output = copy(x)
    (2 * F.cross_entropy(output, y) + output.square().mean()).backward()
    for name, tensor in copy.named_parameters():
        torch.testing.assert_close(trained.tensor(name), tensor - 0.1 * tensor.grad)
    assert digest(Train(during=(OldRewrite(),)).fit(student, work, Context())) == digest(
        Train(during=(Weights(0.5),)).fit(student, work, Context()))
    assert reduce(add, Companions((Old(), Small()), student, work, Context()).terms(x, output, y).values()) is not None


def test_old_names_are_the_new_ones() -> None:
    from featherweight import steps

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert steps.Driver is steps.Criterion is Companion
        assert steps.Objective is steps.Beside
    assert [str(w.message).partition(";")[0] for w in caught] == [
        f"featherweight.steps.{old} is now featherweight.steps.{new}" for old, new in (
            ("Driver", "Companion"), ("Criterion", "Companion"), ("Objective", "Beside"))]


# ---- in a recipe

def test_beside_in_toml_and_in_a_job(tmp_path: Path) -> None:
    student, _, x, y = classes()
    recipe = fw.Recipe([Train(epochs=1, lr=0.01, during=(Weights(0.5),),
                              beside=(Logits(weight=0.5), Channels(ratio=0.5)))])
    assert fw.Recipe.from_toml(recipe.to_toml()) == recipe
    assert eval(str(recipe), {"fw": fw}) == recipe
    split = lambda: [(x, y)]  # noqa: E731
    work = fw.Task(train=split, calibration=split, validation=split, loss=F.cross_entropy)
    done = [fw.compress(student, work, recipe, out=tmp_path / "out", seconds=0.01) for _ in range(2)]
    assert [d.kind for d in done[0].plans] == ["prune.Weights", "prune.Channels"]
    assert [d.summary for d in done[0].plans] == [d.summary for d in done[1].plans]
    assert digest(done[0].network) == digest(done[1].network)


def test_stages_within_a_training_order_themselves() -> None:
    inside = (Quantize(), Weights(0.5), Channels(macs=0.5))
    for order in itertools.permutations(inside):
        fw.Recipe([Train(beside=order)])
    with pytest.raises(RecipeError, match=r"Channels\(macs=0\.5\) \(structure\) comes after"):
        fw.Recipe([Weights(0.5), Train(beside=inside)])


@pytest.mark.parametrize("given", [(3,), ("logits",), (Logits,)])
def test_what_cannot_stand_beside_is_refused(given: Any) -> None:
    with pytest.raises(RecipeError, match=r"expected (an objective|objectives)"):
        fw.Recipe([Train(beside=given)])
    with pytest.raises(RecipeError, match="expected objectives and rewrites"):
        Train(beside=given).fit(network(PROBLEMS["mlp"]), task(PROBLEMS["mlp"]), Context())


def test_groups_are_the_same_beside_copies_of_values() -> None:
    """Channels counted on a graph with copies for rounding are those of the graph without."""
    for problem in ("residual", "attention", "shuffle", "squeeze_excite"):
        plain, edited = network(PROBLEMS[problem]), network(PROBLEMS[problem])
        Quantize().start(edited, task(PROBLEMS[problem])).close()
        one, other = axis_groups(plain), axis_groups(edited)
        assert [(g.name, len(g)) for g in one.groups] == [(g.name, len(g)) for g in other.groups]
        plan = Channels(macs=0.6).plan(edited, fw.Task())
        assert isinstance(plan, ChannelPlan)
        assert {n: t.shape for n, t in plan.apply(plain).tensors().items()} == {
            n: t.shape for n, t in plan.apply(edited).tensors().items()}


def test_a_quantized_plan_follows_a_cut_in_every_scale() -> None:
    net = network(PROBLEMS["residual"])
    work = task(PROBLEMS["residual"])
    companion = Quantize("int4", None).start(net.copy(), work)
    plan = companion.finish()
    cut = Channels(macs=0.5).plan(net, work)
    carried = plan.after(cut, net)
    assert isinstance(carried, QuantizePlan)
    kept, axes = cut.kept(net), {s.weight: s.axis for s in plan.stored}
    for name, axis in axes.items():
        assert torch.equal(carried.tensors[name], narrowed(plan.tensors[name], kept.get(name, ())))
        rows = kept.get(name, (None,) * 4)[axis]
        scale = plan.tensors[f"{name}_scale"]
        assert torch.equal(carried.tensors[f"{name}_scale"], scale if rows is None else scale[rows])
    assert carried.apply(cut.apply(net)).tensor("layer1.0.conv1.weight").dtype == torch.int8
