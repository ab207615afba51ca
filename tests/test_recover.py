"""recover: training keeps zeros, repeats itself, survives a kill; batch-norm statistics are those of the data."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.errors import RecipeError, TaskError
from featherweight.network.edit import tensor_node
from featherweight.recover import BatchNorm, Train
from featherweight.recover.batches import epoch
from featherweight.recover.schedules import SCHEDULES
from featherweight.steps import ALONE, Companion, Context, Plan, Rewrite, Stage
from two_processes import run_by_two

torch.set_num_threads(1)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(self.drop(x.flatten(1)))


def data(n: int = 80) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(n, 1, 4, 4, generator=g)
    return x, (x.sum((1, 2, 3)) > 0).long() + (x[:, 0, 0, 0] > 0).long()


def shuffled(augment: bool = True, n: int = 80) -> Any:
    """A generator that shuffles, and draws noise while it goes, from torch's global generator."""
    x, y = data(n)

    def start() -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(x))
        for part in order.split(16):
            yield x[part] + (0.1 * torch.randn(len(part), 1, 4, 4) if augment else 0), y[part]

    return start


def small() -> fw.Network:
    torch.manual_seed(0)
    return fw.capture(Small(), torch.randn(2, 1, 4, 4))


def task(**more: Any) -> fw.Task:
    return fw.Task(**{"train": shuffled(), "loss": nn.functional.cross_entropy, **more})


def assert_same(a: fw.Network, b: fw.Network) -> None:
    one, other = a.tensors(), b.tensors()
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), f"{name} differs"


def loss_of(network: fw.Network) -> float:
    x, y = data()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(network(x), y))


# ---- what training does

def test_equals_the_plain_loop_that_anybody_would_write() -> None:
    """No dropout and no shuffling: then a hand-written loop must give the same weights, batch norms included."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    network = fw.capture(model, torch.randn(2, 1, 4, 4))
    x, y = data()
    batches = list(zip(x.split(16), y.split(16), strict=True))
    step = Train(epochs=2, lr=0.05, weight_decay=0.01, warmup=0.2, clip=0.5)
    trained = step.fit(network, fw.Task(train=lambda: batches, loss=nn.functional.cross_entropy), Context())
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for i, (a, b) in enumerate(batches * 2):
        p = i / 10
        optimizer.param_groups[0]["lr"] = 0.05 * (p / 0.2 if p < 0.2 else (1 + math.cos((p - 0.2) / 0.8 * math.pi)) / 2)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(a), b).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained.tensor(name).detach(), value, msg=name)


def test_lowers_the_loss_and_leaves_its_input_alone() -> None:
    network = small()
    before = network.copy()
    trained = Train(epochs=8, lr=0.05).fit(network, task(), Context())
    assert_same(network, before)
    assert loss_of(trained) < 0.7 * loss_of(network)
    assert not trained.training
    assert [n.name for n in trained.graph.nodes] == [n.name for n in network.graph.nodes]


@pytest.mark.filterwarnings("ignore:autocast='bf16' on a processor that emulates bfloat16:UserWarning")
@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", "schedule": "onecycle"}, {"autocast": "bf16"},
                                     {"channels_last": True, "clip": 1.0}])
def test_same_seed_same_weights_and_the_callers_generator_is_left_alone(options: dict[str, Any]) -> None:
    step = Train(epochs=2, **options)
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    first = step.fit(small(), task(), Context(seed=1))
    torch.manual_seed(123)
    second = step.fit(small(), task(), Context(seed=1))
    assert_same(first, second)
    other = step.fit(small(), task(), Context(seed=2))
    assert not torch.equal(first.tensor("head.weight"), other.tensor("head.weight"))
    torch.manual_seed(123)
    network = small()
    torch.manual_seed(123)
    step.fit(network, task(), Context())
    torch.testing.assert_close(torch.rand(3), expected)


@pytest.mark.parametrize(("capability", "told"), [("AVX2", 1), ("AVX512", 0)])
def test_emulated_bfloat16_is_told(monkeypatch: pytest.MonkeyPatch, capability: str, told: int) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Train(epochs=1, autocast="bf16").fit(small(), task(), Context())
        Train(epochs=1).fit(small(), task(), Context())
    assert sum("leave autocast out" in str(w.message) for w in caught) == told


def test_weight_decay_can_spare_vectors() -> None:
    x, _ = data()
    frozen = fw.Task(train=lambda: [(x, None)], loss=None)
    network = small()

    @dataclass(frozen=True)
    class Nothing:
        def begin(self, network: fw.Network, context: Context) -> Any:
            return Still()

    class Still:
        def __call__(self, inputs: Any, output: Any, target: Any, loss: Any) -> Tensor:
            return output.sum() * 0

        def close(self) -> None: ...

    step = Train(lr=0.1, weight_decay=0.5, momentum=0.0, schedule="constant", distill=Nothing())
    all_decayed, spared = step.fit(network, frozen, Context()), dataclasses.replace(step, decay_vectors=False).fit(
        network, frozen, Context())
    torch.testing.assert_close(all_decayed.tensor("norm.weight"), 0.95 * network.tensor("norm.weight"))
    torch.testing.assert_close(spared.tensor("norm.weight"), network.tensor("norm.weight"))
    for trained in (all_decayed, spared):
        torch.testing.assert_close(trained.tensor("head.weight"), 0.95 * network.tensor("head.weight"))


@pytest.mark.parametrize("options", [{"optimizer": "sgd"}, {"optimizer": "adamw"}])
def test_zeros_of_a_pattern_stay_and_other_zeros_may_go(options: dict[str, Any]) -> None:
    network = small()
    with torch.no_grad():
        network.tensor("head.weight")[:, ::2] = 0
        network.tensor("conv.weight")[..., 0, 0] = 0
    network.patterns["head.weight"] = "unstructured"
    trained = Train(epochs=3, lr=0.05, **options).fit(network, task(), Context())
    weight = trained.tensor("head.weight")
    assert (weight[:, ::2] == 0).all()
    assert (weight[:, 1::2] != 0).all()
    assert (trained.tensor("conv.weight")[..., 0, 0] != 0).any()
    assert trained.patterns == network.patterns


def test_integer_weights_are_left_alone_and_a_network_of_integers_is_refused() -> None:
    network = small()
    network.tensor("conv.weight").requires_grad_(False)
    trained = Train(lr=0.1).fit(network, task(), Context())
    assert torch.equal(trained.tensor("conv.weight"), network.tensor("conv.weight"))
    assert not torch.equal(trained.tensor("head.weight"), network.tensor("head.weight"))
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(RecipeError, match=r"no trainable tensor.*write model\.requires_grad_\(True\)"):
        Train().fit(network, task(), Context())


@pytest.mark.parametrize(("options", "match"), [
    ({"optimizer": "adam"}, "did you mean 'adamw'"), ({"schedule": "cosin"}, "did you mean 'cosine'"),
    ({"lr": -1.0}, "above 0"), ({"warmup": 1.0}, "below 1"), ({"during": (3,)}, "expected rewrites"),
    ({"distill": "logits"}, "expected an objective")])
def test_senseless_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        Train(**options).fit(small(), task(), Context())


def test_what_the_task_lacks_is_named() -> None:
    with pytest.raises(TaskError, match=r"needs the task's train"):
        Train().fit(small(), fw.Task(loss=nn.functional.cross_entropy), Context())
    with pytest.raises(TaskError, match=r"needs the task's loss"):
        Train().fit(small(), fw.Task(train=shuffled()), Context())
    with pytest.raises(TaskError, match=r"gave 0 batches"):
        Train().fit(small(), task(train=lambda: iter(())), Context())
    with pytest.raises(TaskError, match="no target"):
        Train().fit(small(), task(train=lambda: [(data()[0], None)]), Context())


def test_a_loss_that_runs_away_is_an_error_with_the_line_to_write() -> None:
    with pytest.raises(RecipeError, match=r"the loss was (nan|inf) at step .* Train\(lr=1e\+19\)"):
        Train(lr=1e20, epochs=3).fit(small(), task(), Context())


def test_schedules() -> None:
    for name, factor in SCHEDULES.items():
        values = [factor(i / 100, 0.1) for i in range(100)]
        assert max(values) == pytest.approx(1.0), name
        assert values[:10] == sorted(values[:10]), name
    assert SCHEDULES["cosine"](0.999, 0) < 1e-4 < SCHEDULES["cosine"](0.5, 0)
    assert SCHEDULES["onecycle"](0.0, 0) == pytest.approx(1 / 25)
    assert SCHEDULES["onecycle"](0.3, 0) == pytest.approx(1.0)


def test_progress_is_told_and_a_lone_last_sample_is_left_out() -> None:
    told = []
    x, y = data(33)
    batches = list(zip(x.split(16), y.split(16), strict=True))
    step = Train(epochs=2)
    trained = step.fit(small(), task(train=lambda: iter(batches)), Context(progress=lambda *a: told.append(a)))
    assert [t[1:3] for t in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(t[0] == "recover.Train" and t[3]["loss"] > 0 and t[3]["images_per_s"] > 0 for t in told)
    assert int(trained.tensor("norm.num_batches_tracked")) == 4


# ---- kill and resume

class Killed(Exception):
    pass


def killer(at: int) -> Any:
    calls = [0]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == at:
            raise Killed
        return nn.functional.cross_entropy(output, target)

    return loss


@pytest.mark.parametrize("options", [{"optimizer": "sgd"}, {"optimizer": "adamw"}])
@pytest.mark.parametrize(("every", "at"), [("epoch", 3), ("epoch", 8), (0.0, 8), (0.0, 11)])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, options: dict[str, Any], every: Any,
                                                             at: int) -> None:
    step = Train(epochs=3, lr=0.05, checkpoint_every=every, during=(Masking(0.5),), **options)
    whole = step.fit(small(), task(), Context())
    with pytest.raises(Killed):
        step.fit(small(), task(loss=killer(at)), Context(workdir=tmp_path))
    told: list[Any] = []
    torch.manual_seed(99)
    resumed = step.fit(small(), task(), Context(workdir=tmp_path, progress=lambda *a: told.append(a)))
    assert_same(whole, resumed)
    first = told[0][1]
    assert first == (at if every == 0.0 else (at - 1) // 5 * 5 + 1), "it did not go on from where it was"
    again = step.fit(small(), task(loss=killer(1)), Context(workdir=tmp_path))
    assert_same(whole, again)


def test_a_foreign_checkpoint_is_refused_and_a_damaged_one_starts_over(tmp_path: Path) -> None:
    Train(lr=0.02).fit(small(), task(), Context(workdir=tmp_path))
    for step, network, seed in ((Train(lr=0.03), small(), 0), (Train(lr=0.02), small(), 1)):
        with pytest.raises(RecipeError, match="belongs to other options"):
            step.fit(network, task(), Context(workdir=tmp_path, seed=seed))
    other = small()
    with torch.no_grad():
        other.tensor("head.bias")[0] += 1
    with pytest.raises(RecipeError, match="another network"):
        Train(lr=0.02).fit(other, task(), Context(workdir=tmp_path))
    file = tmp_path / "checkpoint.safetensors"
    whole = file.read_bytes()
    assert b"pickle" not in whole
    assert not list(tmp_path.glob("*.part"))
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="cannot be read"):
        trained = Train(lr=0.02).fit(small(), task(), Context(workdir=tmp_path))
    assert_same(trained, Train(lr=0.02).fit(small(), task(), Context()))


def test_skipped_rounds_do_not_change_what_follows() -> None:
    whole = list(epoch(task(), 7, 0, None, 0, 1, True))
    torch.manual_seed(4)
    rest = list(epoch(task(), 7, 3, None, 0, 1, True))
    for (a, b), (c, d) in zip(whole[3:], rest, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_each_process_gets_its_own_share() -> None:
    whole = list(epoch(task(train=shuffled(False)), 7, 0, None, 0, 1, True))
    shares = [list(epoch(task(train=shuffled(False)), 7, 0, None, rank, 2, True)) for rank in (0, 1)]
    assert [len(s) for s in shares] == [2, 2]
    for rank in (0, 1):
        for (a, _), (b, _) in zip(whole[rank:4:2], shares[rank], strict=True):
            assert torch.equal(a, b)


# ---- rewrites at work during the training

@dataclass(frozen=True)
class Masked(Plan):
    kind: ClassVar[str] = "test.masked/1"
    weight: str

    def apply(self, network: fw.Network) -> fw.Network:
        other = network.copy()
        other.set_tensor(self.weight, other.tensor(self.weight) * self.tensors["mask"])
        other.patterns[self.weight] = "test"
        return other

    def summary(self) -> str:
        return f"zeros in {self.weight}"


@dataclass(frozen=True)
class Masking(Rewrite):
    """Masks the smallest weights of the head, more and more of them; learns a scale of its own beside."""

    sparsity: float = 0.5
    stage = Stage.SPARSITY

    def plan(self, network: fw.Network, task: fw.Task) -> Plan:
        return self.start(network, task).finish()

    def start(self, network: fw.Network, task: fw.Task, context: Context = ALONE) -> Companion:
        return MaskDriver(self, network)


class MaskDriver(Companion):
    def __init__(self, step: Masking, network: fw.Network) -> None:
        self.step, self.network, self.seen = step, network, []
        self.mask = torch.ones_like(network.tensor("head.weight"))
        self.scale = torch.ones(1, requires_grad=True)
        node = tensor_node(network, "head.weight", network.calls(torch.ops.aten.linear.default)[0])
        self.remove = network.add_tap(node.name, lambda w: w * self.mask * self.scale)

    def update(self, progress: float) -> None:
        self.seen.append(progress)
        weight = self.network.tensor("head.weight").detach().abs()
        count = int(self.step.sparsity * progress * weight.numel())
        self.mask = torch.ones_like(weight)
        if count:
            self.mask.view(-1)[weight.view(-1).argsort()[:count]] = 0

    def parameters(self) -> list[Tensor]:
        return [self.scale]

    def state(self) -> dict[str, Tensor]:
        return {"mask": self.mask}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.mask = state["mask"]

    def finish(self) -> Plan:
        self.remove()
        assert self.seen == sorted(self.seen)
        return Masked("head.weight", tensors={"mask": self.mask, "scale": self.scale.detach()})


def test_a_driver_follows_the_progress_trains_its_own_parameters_and_its_plan_is_applied(tmp_path: Path) -> None:
    network = small()
    trained = Train(epochs=2, lr=0.05, during=(Masking(0.5),)).fit(network, task(), Context(workdir=tmp_path))
    plan = Plan.load(tmp_path / "during_0.plan")
    assert (trained.tensor("head.weight") == 0).float().mean() == 0.5
    assert trained.patterns == {"head.weight": "test"}
    assert plan.tensors["scale"] != 1
    again = Train(epochs=1).fit(trained, task(), Context())
    assert (again.tensor("head.weight") == 0).float().mean() == 0.5


# ---- batch norm

def test_batch_norm_statistics_equal_torchs_own_re_estimation() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4),
                          nn.Flatten(), nn.Linear(16, 3)).double()
    x = data()[0].double()
    network = fw.capture(model, x[:2])
    unlabelled = fw.Task(calibration=lambda: [(b, None) for b in x.split(16)])
    fitted = BatchNorm(batches=None).fit(network, unlabelled, Context())
    torch.optim.swa_utils.update_bn(x.split(16), model)
    for name, value in model.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(fitted.tensor(name).detach(), value, msg=name)


def test_batch_norm_changes_nothing_else_ignores_dropout_and_needs_batches() -> None:
    network = small()
    fitted = BatchNorm(batches=2).fit(network, task(loss=None), Context())
    changed = {n for n, t in network.tensors().items() if not torch.equal(t, fitted.tensor(n))}
    assert changed == {"norm.running_mean", "norm.running_var"}
    plain = fw.capture(nn.Linear(4, 2), torch.randn(2, 4))
    assert_same(plain, BatchNorm().fit(plain, fw.Task(), Context()))
    with pytest.raises(TaskError, match="calibration split"):
        BatchNorm().fit(network, fw.Task(), Context())
    with pytest.raises(RecipeError, match="expected 1 or more"):
        BatchNorm(batches=0).fit(network, task(), Context())


# ---- several processes

def test_processes_that_do_not_know_of_one_another_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Train(epochs=0).fit(small(), task(), Context())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match=r"not joined; start them by 'accelerate launch"):
        Train().fit(small(), task(), Context())


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from accelerate import PartialState
import test_recover as t
from featherweight.recover import Train
from featherweight.steps import Context
from pathlib import Path
seen = []
def train():
    for x, y in t.shuffled(False)():
        yield x, y
def loss(output, target):
    seen.append(target.clone())
    return torch.nn.functional.cross_entropy(output, target)
step = Train(epochs=2, lr=0.05, during=(t.Masking(0.5),))
network = step.fit(t.small(), t.task(train=train, loss=loss), Context(workdir=Path({out!r}) / "work"))
import test_recipe as r
whole = r.squeeze(r.tiny(), r.task(), r.RECIPE, out=Path({out!r}) / "out")
assert len(whole.trail) == 5
assert r.squeeze(r.tiny(), r.task(), r.RECIPE, out=Path({out!r}) / "out").trail == whole.trail
found = dict(whole=dict(whole.network.state_dict()), tensors=dict(network.state_dict()), seen=seen)
torch.save(found, Path({out!r}) / f"{{PartialState().process_index}}.pt")
"""


def test_two_processes_share_the_batches_and_agree(tmp_path: Path) -> None:
    one, other = run_by_two(SCRIPT, tmp_path)
    for key in ("tensors", "whole"):
        for name, tensor in one[key].items():
            assert torch.equal(tensor, other[key][name]), name
    assert len(one["seen"]) == len(other["seen"]) == 4, "5 batches in rounds of 2, twice"
    assert not any(torch.equal(a, b) for a, b in zip(one["seen"], other["seen"], strict=True))
    assert [p.name for p in (tmp_path / "work").iterdir() if p.suffix == ".safetensors"] == ["checkpoint.safetensors"]
