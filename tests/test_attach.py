"""attach: the same companions beside a loop of one's own as beside Train's, in plain loops, Lightning and Hugging Face.
"""

from __future__ import annotations

import doctest
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight.distill import Logits
from featherweight.errors import RecipeError
from featherweight.factorize import LowRank
from featherweight.network.file.digest import digest
from featherweight.prune import Channels, Weights
from featherweight.quantize import Quantize
from featherweight.recover import Train, attach
from featherweight.steps import Companion, Context
from problems import PROBLEMS, network, task
from test_companions import Small, assert_close

torch.set_num_threads(1)
LR = 0.05
BESIDE: dict[str, tuple[Any, ...]] = {
    "teacher": (Logits(temperature=2.0, weight=0.5),),
    "weights": (Weights(0.7, frequency=0.2),),
    "surgery": (Weights(0.7, regrow="surgery", end=0.4, frequency=0.2),),
    "channels": (Channels(macs=0.6, frequency=0.2),),
    "penalty on channels": (Channels(macs=0.6, schedule="growing", frequency=0.2),),
    "quantize": (Quantize("int4", "uint4"),),
    "powers of two": (Quantize("apot4", "uint4", learn="apot", ends=None),),
    "all": (Quantize("int4", "uint4", learn="pact"), Weights(0.7, frequency=0.2), Logits(weight=0.5),
            Channels(macs=0.6, schedule="group_lasso", frequency=0.2)),
}
everything = pytest.mark.parametrize("name", BESIDE)


def batches() -> list[tuple[Tensor, Tensor]]:
    return list(task(PROBLEMS["residual"]).batches("train"))


def student() -> fw.Network:
    return network(PROBLEMS["residual"])


def trained(name: str, epochs: int = 2) -> fw.Network:
    """By Train, at a constant rate and without weight decay."""
    step = Train(epochs=epochs, lr=LR, schedule="constant", weight_decay=0.0, beside=BESIDE[name])
    return step.fit(student(), task(PROBLEMS["residual"]), Context(original=student()))


def plain(net: fw.Network, attached: Any, optimizer: torch.optim.Optimizer,
          data: list[tuple[Tensor, Tensor]]) -> None:
    """The loop that anybody would write."""
    net.train()
    for inputs, target in data:
        optimizer.zero_grad()
        attached.loss(inputs, net(inputs), target).backward()
        optimizer.step()


def started(name: str, steps: int) -> tuple[fw.Network, Any, torch.optim.Optimizer]:
    net = student()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
    return net, attach(net, task(PROBLEMS["residual"]), BESIDE[name], steps=steps, optimizer=optimizer), optimizer


# ---- a plain loop

def test_the_example_of_the_docstring_runs() -> None:
    module = sys.modules["featherweight.recover.attach"]
    found = doctest.DocTestFinder().find(module.attach, "attach", globs={})
    examples = [t for t in found if t.examples]
    assert len(examples) == 1
    assert len(examples[0].examples) >= 10
    torch.manual_seed(0)
    assert doctest.DocTestRunner().run(examples[0]) == (0, len(examples[0].examples))


@everything
def test_a_plain_loop_ends_where_train_does(name: str) -> None:
    """The same batches in the same order: the same network, bit for bit."""
    data = batches() * 2
    net, attached, optimizer = started(name, len(data))
    plain(net, attached, optimizer, data)
    found = attached.finish()
    assert digest(found) == digest(trained(name))
    assert not found.training
    assert not net._taps
    assert found is attached.finish()


@everything
def test_what_trained_is_what_comes_out(name: str) -> None:
    data = batches() * 2
    net, attached, optimizer = started(name, len(data))
    plain(net, attached, optimizer, data)
    x = PROBLEMS["residual"].example(6, seed=77)
    with torch.no_grad():
        wanted = net.eval()(x)
        assert_close([attached.finish()(x)], [wanted])


@everything
@pytest.mark.parametrize("at", [2, 4])
def test_a_loop_that_was_stopped_goes_on_alike(name: str, at: int, tmp_path: Path) -> None:
    data = batches() * 2
    net, attached, optimizer = started(name, len(data))
    plain(net, attached, optimizer, data[:at])
    held = {"network": net.state_dict(), "optimizer": optimizer.state_dict(), "attached": attached.state_dict()}
    torch.save(held, tmp_path / "checkpoint.pt")
    plain(net, attached, optimizer, data[at:])
    again, other, second = started(name, len(data))
    held = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again.load_state_dict(held["network"])
    second.load_state_dict(held["optimizer"])
    other.load_state_dict(held["attached"])
    plain(again, other, second, data[at:])
    assert digest(other.finish()) == digest(attached.finish())


def test_the_progress_is_told_before_the_first_forward_pass_of_a_step() -> None:
    """Several passes a step (accumulated gradients, validation between steps) tell it once."""
    told: list[float] = []

    class Listening(Companion):
        def update(self, progress: float) -> None:
            told.append(progress)

    @dataclass(frozen=True)
    class Listen:
        def start(self, network: fw.Network, task: fw.Task, context: Context) -> Companion:
            return Listening()

    net, (x, y) = student(), batches()[0]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    attached = attach(net, task(PROBLEMS["residual"]), (Listen(),), steps=4, optimizer=optimizer)
    for _ in range(4):
        for part in (slice(4), slice(4, 8)):
            (attached.loss(x[part], net(x[part]), y[part]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        net.eval()(x)
    attached.finish()
    assert told == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert attached.progress == 1


def test_a_loop_that_ends_early_gives_all_that_was_asked_for() -> None:
    data = batches()
    net, attached, optimizer = started("weights", 100)
    plain(net, attached, optimizer, data)
    found = attached.finish()
    share = [float((found.tensor(n) == 0).float().mean()) for n in found.patterns]
    sizes = [found.tensor(n).numel() for n in found.patterns]
    assert sum(a * b for a, b in zip(share, sizes, strict=True)) / sum(sizes) == pytest.approx(0.7, abs=0.01)


def test_a_loop_that_goes_on_too_long_is_told() -> None:
    net, attached, optimizer = started("weights", 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain(net, attached, optimizer, batches() * 2)
    assert [str(w.message) for w in caught if "goes on after" in str(w.message)] == [
        "the training goes on after attach(steps=2); what works beside it has settled"]
    assert attached.finish().patterns


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_zeros_of_a_pattern_stay(kind: str) -> None:
    net = Weights(0.6).plan(student(), fw.Task()).apply(student())
    before = {n: net.tensor(n) == 0 for n in net.patterns}
    optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind](net.parameters(), lr=0.05)
    attached = attach(net, task(PROBLEMS["residual"]), steps=6, optimizer=optimizer)
    plain(net, attached, optimizer, batches() * 2)
    found = attached.finish()
    assert all(bool((found.tensor(n)[zero] == 0).all()) for n, zero in before.items())
    assert digest(found) != digest(net.copy().eval()) or not torch.equal(found.tensor("fc.weight"),
                                                                         student().tensor("fc.weight"))


def test_clipping_comes_after_what_is_added_to_gradients() -> None:
    """As in Train(clip=...): the loop says where, by a call of its own."""
    things = BESIDE["penalty on channels"]
    work = task(PROBLEMS["residual"])
    wanted = Train(epochs=2, lr=LR, schedule="constant", weight_decay=0.0, clip=0.1, beside=things).fit(
        student(), work, Context())
    net = student()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
    attached = attach(net, work, things, steps=6, optimizer=optimizer)
    net.train()
    for inputs, target in batches() * 2:
        attached.loss(inputs, net(inputs), target).backward()
        attached.after_backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert digest(attached.finish()) == digest(wanted)


def test_a_step_with_a_closure_is_followed_too() -> None:
    net, attached, optimizer = started("all", 6)
    net.train()
    for inputs, target in batches() * 2:
        def closure(inputs: Tensor = inputs, target: Tensor = target) -> Tensor:
            optimizer.zero_grad()
            loss = attached.loss(inputs, net(inputs), target)
            loss.backward()
            return loss

        assert float(optimizer.step(closure).detach()) > 0  # type: ignore[union-attr]
    assert digest(attached.finish()) == digest(trained("all"))


def test_the_optimizer_may_come_later_and_hold_the_learned_parameters() -> None:
    net = student()
    attached = attach(net, task(PROBLEMS["residual"]), BESIDE["quantize"], steps=6)
    x, y = batches()[0]
    with pytest.raises(RecipeError, match=r"knows no optimizer.*attached\.follow\(optimizer\)"):
        attached.loss(x, net(x), y)
    own = attached.parameters()
    assert own
    optimizer = torch.optim.SGD([*net.parameters(), *own], lr=LR, momentum=0.9)
    attached.follow(optimizer)
    assert len(optimizer.param_groups) == 1
    before = [p.detach().clone() for p in own]
    plain(net, attached, optimizer, batches() * 2)
    assert not all(torch.equal(a, b) for a, b in zip(before, own, strict=True))
    assert digest(attached.finish()) == digest(trained("quantize"))


def test_terms_and_a_loss_that_the_model_gives_itself() -> None:
    net = student()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    attached = attach(net, fw.Task(), (Small(0.5), Logits(weight=0.25)), steps=2, optimizer=optimizer)
    x, y = batches()[0]
    output = net(x)
    own = F.cross_entropy(output, y)
    total = attached.loss(x, output, own=own)
    assert attached.terms.keys() == {"task", "test_companions.Small", "distill.Logits"}
    torch.testing.assert_close(attached.terms["task"], 0.75 * own.detach())
    torch.testing.assert_close(total.detach(), sum(attached.terms.values()))
    assert not any(t.requires_grad for t in attached.terms.values())
    with pytest.raises(RecipeError, match=r"distill\.Logits mixes in the task's loss"):
        attached.loss(x, output)


def test_attaching_draws_nothing_from_the_generators_of_the_loop() -> None:
    net = student()
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    attach(net, task(PROBLEMS["residual"]), BESIDE["all"], steps=6).close()
    assert torch.equal(torch.rand(3), wanted)
    assert not net._taps


def test_the_teacher_is_the_network_as_it_was_or_another() -> None:
    net, (x, y) = student(), batches()[0]
    teacher = Weights(0.9).plan(net, fw.Task()).apply(net)
    for given in (None, teacher):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        attached = attach(net, task(PROBLEMS["residual"]), (Logits(weight=1.0),), steps=1, optimizer=optimizer,
                          original=given)
        found = float(attached.loss(x, net(x), y).detach())
        assert found > 1e-4 if given is not None else found == pytest.approx(0, abs=1e-5)
        attached.close()


# ---- misuse

def test_what_is_wrong_is_said_before_any_step() -> None:
    net, work = student(), task(PROBLEMS["residual"])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for beside, steps, match in (
        ((), 0, r"attach\(steps=0\).*steps=epochs \* len\(loader\)"),
        ((Weights,), 5, "expected objectives and rewrites"), (("weights",), 5, "expected objectives and rewrites"),
        ((LowRank(),), 5, "LowRank cannot be used during training"),
        ((Channels(macs=0.5), Channels(macs=0.4)), 5, "two plans cut channels"),
        ((Quantize("binary", None, ends=None), Weights(0.5)), 5, "no place among the levels of binary"),
        ((Weights(compensate="obs"),), 5, "works at once"), ((Weights(sparsity=2.0),), 5, "sparsity=2.0"),
    ):
        with pytest.raises(RecipeError, match=match):
            attach(net, work, beside, steps=steps, optimizer=optimizer)
        assert not net._taps
    first = attach(net, work, (Weights(0.5),), steps=5, optimizer=optimizer)
    with pytest.raises(RecipeError, match=r"attached already.*attached\.finish\(\)"):
        attach(net, work, (Weights(0.5),), steps=5, optimizer=optimizer)
    with pytest.raises(RecipeError, match="follows one optimizer"):
        first.follow(optimizer)
    first.close()
    other = torch.optim.SGD(student().parameters(), lr=0.01)
    with pytest.raises(RecipeError, match=r"no parameter of the attached network.*network\.parameters\(\)"):
        attach(net, work, (Weights(0.5),), steps=5, optimizer=other)
    scheduled = torch.optim.SGD(net.parameters(), lr=0.01)
    torch.optim.lr_scheduler.CosineAnnealingLR(scheduled, 5)
    with pytest.raises(RecipeError, match=r"make the scheduler after attach"):
        attach(net, work, (Quantize(),), steps=5, optimizer=scheduled)
    assert not net._taps
    attach(net, work, (Weights(0.5),), steps=5, optimizer=scheduled).close()
    quantized = Quantize(activations=None).plan(net, work).apply(net)
    for parameter in quantized.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(RecipeError, match="no trainable tensor"):
        attach(quantized, work, (Weights(0.5),), steps=5)


def test_a_term_that_is_left_out_is_missed() -> None:
    net, attached, optimizer = started("teacher", 6)
    x, y = batches()[0]
    F.cross_entropy(net(x), y).backward()
    with pytest.raises(RecipeError, match=r"without the terms of distill\.Logits; write attached\.loss"):
        optimizer.step()
    attached.close()
    net, attached, optimizer = started("weights", 6)
    for x, y in batches() * 2:
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert attached.finish().patterns


def test_the_state_of_another_is_refused() -> None:
    state = started("weights", 6)[1].state_dict()
    for name in ("quantize", "channels"):
        with pytest.raises(RecipeError, match=r"state of another attach.*same beside=\(\.\.\.\) first"):
            started(name, 6)[1].load_state_dict(state)
    with pytest.raises(RecipeError, match="state of another"):
        started("weights", 6)[1].load_state_dict({})


# ---- Lightning

def loader(names: tuple[str, ...] = ()) -> Any:
    """Batches without shuffling, as a DataLoader gives them: pairs, or dicts with these names."""
    pairs = [pair for inputs, targets in batches() for pair in zip(inputs, targets, strict=True)]
    rows = [dict(zip(names, pair, strict=True)) for pair in pairs] if names else pairs
    return torch.utils.data.DataLoader(rows, batch_size=8)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["all", "penalty on channels"])
def test_in_a_lightning_module(name: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning")
    net = student()

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = net

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.network.parameters(), lr=LR, momentum=0.9)
            self.attached = attach(self.network, task(PROBLEMS["residual"]), BESIDE[name],
                                   steps=self.trainer.estimated_stepping_batches, optimizer=optimizer)
            return optimizer

        def training_step(self, batch: Any, index: int) -> Tensor:
            inputs, target = batch
            return self.attached.loss(inputs, self.network(inputs), target)

    module = Module()
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                                enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)
    module.network.train()
    trainer.fit(module, loader())
    assert module.attached.done == 6
    assert digest(module.attached.finish()) == digest(trained(name))


# ---- Hugging Face

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["all", "penalty on channels"])
def test_in_a_hugging_face_trainer(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    net = student()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
    attached = attach(net, task(PROBLEMS["residual"]), BESIDE[name], steps=6, optimizer=optimizer)

    class Trainer(transformers.Trainer):  # type: ignore[misc]
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False,
                         **more: Any) -> Any:
            output = model(inputs["x"])
            loss = attached.loss(inputs["x"], output, inputs["labels"])
            return (loss, output) if return_outputs else loss

        def get_train_dataloader(self) -> Any:
            return loader(("x", "labels"))

    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, num_train_epochs=2, max_grad_norm=0.0, use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False)
    Trainer(net, arguments, optimizers=(optimizer, constant)).train()
    assert attached.done == 6
    assert digest(attached.finish()) == digest(trained(name))
