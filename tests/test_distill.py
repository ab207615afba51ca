"""distill.Logits: equal to the formula, and it does what it is for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.distill import Logits
from featherweight.distill.logits import divergence
from featherweight.distill.taps import matched, output_node
from featherweight.errors import RecipeError
from featherweight.recover import Train
from featherweight.recover.companions import Companions
from featherweight.steps import Context
from featherweight.task import call
from problems import PROBLEMS, network

torch.set_num_threads(1)
NOTHING = fw.Task()


def slow_divergence(student: list[float], teacher: list[float], t: float) -> float:
    """Hinton et al. 2015 for one sample, term by term."""
    def soft(z: list[float]) -> list[float]:
        e = [math.exp(v / t) for v in z]
        return [v / sum(e) for v in e]

    p, q = soft(teacher), soft(student)
    return t * t * sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("t", [1.0, 4.0])
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4, 2)])
def test_equals_the_formula_written_out(t: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(shape), torch.randn(shape)
    rows = [x.movedim(1, -1).reshape(-1, 3).tolist() for x in (student, teacher)]
    expected = sum(slow_divergence(s, q, t) for s, q in zip(*rows, strict=True)) / len(rows[0])
    assert float(divergence(student, teacher, t)) == pytest.approx(expected, rel=1e-5)
    assert float(divergence(teacher, teacher, t)) == pytest.approx(0, abs=1e-6)


def test_classes_of_a_sequence_lie_on_the_last_axis() -> None:
    student, teacher = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    torch.testing.assert_close(divergence(student, teacher, 2.0, -1),
                               divergence(student.movedim(-1, 1), teacher.movedim(-1, 1), 2.0))


def term(objective: Logits, student: fw.Network, teacher: fw.Network | None, x: Tensor, output: Any) -> Tensor:
    """What the objective adds to the loss."""
    found = objective.start(student, NOTHING, Context(original=teacher)).loss(x, output, None)
    assert found is not None
    return found


def net(seed: int, width: int = 8) -> fw.Network:
    torch.manual_seed(seed)
    return fw.capture(nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)), torch.randn(2, 4))


def test_mixes_with_the_tasks_loss_and_gives_the_teacher_no_gradient() -> None:
    teacher, student = net(1), net(2)
    x = torch.randn(6, 4)
    companions = Companions((Logits(temperature=2.0, weight=0.25),), student, NOTHING, Context(original=teacher))
    output = student(x)
    terms = companions.terms(x, output, None, torch.tensor(2.0))
    total = terms["task"] + terms["distill.Logits"]
    expected = 0.25 * divergence(output, teacher(x).detach(), 2.0) + 0.75 * 2.0
    torch.testing.assert_close(total, expected)
    total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in student.parameters())
    torch.testing.assert_close(term(Logits(weight=1.0), student, teacher, x, teacher(x)), torch.tensor(0.0), atol=1e-6,
                               rtol=0)


def agreement(a: fw.Network, b: fw.Network) -> float:
    x = torch.randn(2000, 4, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return float((a(x).argmax(1) == b(x).argmax(1)).float().mean())


def test_a_student_gets_nearer_to_its_teacher_than_by_labels_alone() -> None:
    """Few, noisy labels: the teacher's whole distribution says more than they do."""
    teacher = net(1, 32)
    teacher.set_tensor("2.weight", 10 * teacher.tensor("2.weight"))  # a sure teacher, as trained ones are
    g = torch.Generator().manual_seed(0)
    x = torch.randn(192, 4, generator=g)
    with torch.no_grad():
        y = teacher(x).argmax(1)
    noisy = torch.where(torch.rand(len(y), generator=g) < 0.3, torch.randint(0, 3, (len(y),), generator=g), y)
    task = fw.Task(train=lambda: [(x[i:i + 32], noisy[i:i + 32]) for i in range(0, 192, 32)],
                   loss=nn.functional.cross_entropy)
    for seed in (2, 3):
        with_teacher, without = (
            Train(epochs=40, lr=0.05, distill=objective, seed=seed).fit(net(seed), task, Context(original=teacher))
            for objective in (Logits(), None))
        assert agreement(with_teacher, teacher) > agreement(without, teacher) + 0.02


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"ids": x.argmax(1), "small": self.a(x), "large": self.b(x)}


@pytest.mark.parametrize(("which", "key"), [(None, "small"), ("large", "large")])
def test_chooses_an_output(which: Any, key: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    student, teacher = (fw.capture(Two(), x) for _ in range(2))
    value = term(Logits(weight=1.0, output=which), student, teacher, x, student(x))
    torch.testing.assert_close(value, divergence(student(x)[key], teacher(x)[key], 4.0))
    with pytest.raises(RecipeError, match="did you mean 'large'"):
        term(Logits(weight=1.0, output="larg"), student, teacher, x, student(x))


def test_a_teacher_of_its_own_or_from_a_file(tmp_path: Path) -> None:
    teacher, x = net(1), torch.randn(3, 4)
    teacher.save(tmp_path / "teacher.fw")
    by_file = term(Logits(weight=1.0, teacher=str(tmp_path / "teacher.fw")), net(2), net(3), x, net(2)(x))
    torch.testing.assert_close(by_file, term(Logits(weight=1.0, teacher=teacher), net(2), None, x, net(2)(x)))


def test_what_is_wrong_is_said() -> None:
    student = net(2)
    with pytest.raises(RecipeError, match=r"no teacher.*write Logits\(teacher=network\)"):
        Logits().start(student, NOTHING, Context())
    with pytest.raises(RecipeError, match="temperature=0"):
        Logits(temperature=0).start(student, NOTHING, Context(original=student))
    with pytest.raises(RecipeError, match="teacher's share"):
        Logits(weight=1.5).start(student, NOTHING, Context(original=student))
    x = torch.randn(2, 4)
    with pytest.raises(RecipeError, match=r"write Logits\(weight=1\.0\)"):
        Companions((Logits(),), student, NOTHING, Context(original=student)).terms(x, student(x), None)
    with pytest.raises(RecipeError, match=r"shape \[2, 3\], the student's \[2, 4\]"):
        term(Logits(), student, student, x, torch.randn(2, 4))


# ---- the same value in both networks

MODULES = ["mlp", "conv_bn", "residual", "squeeze_excite", "attention", "gated", "conv1d", "dropout", "transposed"]


@pytest.mark.parametrize("problem", MODULES)
def test_a_path_names_what_the_module_gives(problem: str) -> None:
    """Against forward hooks on the model itself, for every module that gives one tensor."""
    row = PROBLEMS[problem]
    model, captured, x = row.factory(), network(row), row.example(3, seed=4)
    given: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if path:
            module.register_forward_hook(lambda module, inputs, output, path=path: given.update(
                {path: output.clone() if isinstance(output, Tensor) else output}))
    with torch.no_grad():
        call(model, x)
    seen: dict[str, Tensor] = {}
    paths = [path for path, output in given.items() if isinstance(output, Tensor)]
    assert len(paths) > 2
    nodes = {path: output_node(captured, path) for path in paths}
    with torch.no_grad(), captured.taps({node: lambda value, node=node: seen.update({node: value})  # type: ignore[misc]
                                         for node in nodes.values()}):
        call(captured, x)
    for path, node in nodes.items():
        torch.testing.assert_close(seen[node], given[path], msg=path)


def test_paths_are_matched_in_networks_that_differ() -> None:
    """The student was cut, quantized and lost its batch norms; other names are given as a mapping."""
    row = PROBLEMS["residual"]
    teacher = network(row)
    cut = fw.prune.Channels(macs=0.5).plan(teacher, fw.Task()).apply(teacher)
    student = fw.quantize.Quantize(activations=None).plan(cut, fw.Task()).apply(cut)
    one, other = matched(student, teacher, ("layer1.0", "layer2"))
    assert (one.teacher, other.teacher) == (output_node(teacher, "layer1.0"), output_node(teacher, "layer2"))
    assert {one.student, other.student} <= {n.name for n in student.calls()}
    mapped = matched(student, network(PROBLEMS["conv_bn"]), {"layer1.1": "0", "fc": "relu__1"})
    assert [m.teacher for m in mapped] == ["relu_", "relu__1"]
    with pytest.raises(RecipeError, match=r"the student has no module 'layer1\.0\.bn1'.*'layer1\.0\.conv1'"):
        matched(student, teacher, ("layer1.0.bn1",))


def test_a_path_that_names_nothing_or_too_much_is_answered_with_what_there_is() -> None:
    residual, shuffle, shared = (network(PROBLEMS[name]) for name in ("residual", "shuffle", "shared"))
    with pytest.raises(RecipeError, match=r"the teacher has no module 'layer1\.0\.con1'; did you mean "
                                          r"'layer1\.0\.conv1'\? It has 'stem', .*and \d+ more"):
        matched(residual, residual, {"layer1.0.conv1": "layer1.0.con1"})
    with pytest.raises(RecipeError, match=r"the student's module 'branch' gives 2 values \('relu__2', 'relu__4'\); "
                                          r"write the name of one of these nodes .* within it: 'branch\.0'"):
        matched(shuffle, residual, {"branch": "stem"})
    with pytest.raises(RecipeError, match=r"'block' gives 2 values \('relu__1', 'relu__2'\)"):
        output_node(shared, "block")
    assert output_node(shared, "relu__1") == "relu__1"
