"""Calls that cannot work: each is refused before any work, in words, with the line to write instead."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
import problems
from featherweight.balance.combine.budget import lost
from featherweight.distill import Features, Logits, Regression, Relations
from featherweight.errors import ExportError, FeatherweightError, FileError, RecipeError, TaskError
from featherweight.recipe.apply import _stops_told
from featherweight.recipe.files import JOBS, check_alone
from featherweight.recover import Train
from featherweight.recover.companions import advice
from problems import PROBLEMS

NETWORK, TASK = problems.network(PROBLEMS["mlp"]), problems.task(PROBLEMS["mlp"])
MODULE = PROBLEMS["mlp"].factory()
BUDGET = fw.Budget(macs=0.5)
UNFIT = dataclasses.replace(TASK, validation=[(torch.zeros(4, 7), torch.zeros(4, dtype=torch.long))])
UNSCORED = fw.Task(train=TASK.train, calibration=TASK.calibration, validation=TASK.validation, loss=TASK.loss)


def compress(*steps: Any, network: Any = NETWORK, task: Any = TASK, **options: Any) -> Any:
    return fw.compress(network, task, [fw.prune.Channels(macs=0.8), *steps], seconds=0.01, **options)


def raising(x: Tensor) -> Tensor:
    raise ValueError("no")


def nan(x: Tensor) -> Tensor:
    return torch.full((len(x), problems.CLASSES), float("nan"))


def wide(x: Tensor) -> Tensor:
    return torch.zeros(len(x), problems.CLASSES + 1)


def arrays(x: Tensor) -> Any:
    return torch.zeros(len(x), problems.CLASSES).numpy()


#: what a function is given, the error and what it says
GIVEN: dict[str, tuple[Callable[[], Any], type[FeatherweightError], str]] = {
    "a name for a task": (lambda: compress(task="x"), RecipeError, r"task='x'; expected a fw\.Task, as in"),
    "no task": (lambda: compress(task=None), RecipeError, r"task=None; expected a fw\.Task"),
    "no recipe": (lambda: fw.compress(NETWORK, TASK, None), RecipeError, r"list of steps, not None; write fw\.Recipe"),
    "no target": (lambda: compress(target=None), ExportError, "no target named None; known: "),
    "a listener that is none": (lambda: compress(progress="x"), RecipeError,
                                "progress='x'; expected a function of"),
    "no folder's name": (lambda: compress(out="a\0b"), RecipeError, 'expected a folder, as in compress.*out="out"'),
    "a file for a folder": (lambda: compress(out=__file__), RecipeError, r"is a file; expected a folder"),
    "below a file": (lambda: compress(out=f"{__file__}/out"), RecipeError, r"test_wrong_calls\.py is a file"),
    "search: a module": (lambda: fw.search(MODULE, TASK, BUDGET), RecipeError, r"search fw\.capture\(model"),
    "search: no task": (lambda: fw.search(NETWORK, "x", BUDGET), RecipeError, "search was given task='x'"),
    "search: no target": (lambda: fw.search(NETWORK, TASK, BUDGET, None), ExportError, "no target named None"),
    "search: a file": (lambda: fw.search(NETWORK, TASK, BUDGET, out=__file__), RecipeError, "is a file; expected"),
    "search: a name to recover": (lambda: fw.search(NETWORK, TASK, BUDGET, recover="train"), RecipeError,
                                  r"write|as in search\(recover=fw\.recover\.Train\(epochs=5\)\)"),
    "search: no training": (lambda: fw.search(NETWORK, TASK, BUDGET, recover=fw.quantize.Quantize()), RecipeError,
                            r"as in search\(recover=fw\.recover\.Train\(epochs=5\)\)"),
    "search: a wrong training": (lambda: fw.search(NETWORK, TASK, BUDGET, recover=Train(lr=-1)), RecipeError, "lr=-1"),
    "search: a wrong teacher": (
        lambda: fw.search(NETWORK, TASK, BUDGET, recover=Train(distill=Logits(teacher="nope.fw"))), RecipeError,
        "teacher='nope.fw': nope.fw: no such file"),
    "search: a family's name": (lambda: fw.search(NETWORK, TASK, BUDGET, families="channel"), RecipeError,
                                "no families 'channel'; did you mean 'channels'"),
    "search: no device": (lambda: fw.search(NETWORK, TASK, BUDGET, times="nowhere"), FileError,
                          "featherweight bench-table MODEL --out nowhere"),
    "search: no score": (lambda: fw.search(NETWORK, UNSCORED, fw.Budget(macs=0.5, score_drop=1.0)), TaskError,
                         r"search weighs .* write Task\(score=fw\.scores\.top1"),
    "search: the drop unasked": (lambda: fw.search(NETWORK, UNSCORED, BUDGET), TaskError, "the task has none"),
    "advise: no score": (lambda: fw.advise(NETWORK, UNSCORED), TaskError, "advise weighs what is saved"),
    "advise: a module": (lambda: fw.advise(MODULE, TASK), RecipeError, r"advise fw\.capture\(model"),
    "sensitivity: a module": (lambda: fw.sensitivity(MODULE, TASK), RecipeError, r"sensitivity fw\.capture\(model"),
    "attach: a module": (lambda: fw.recover.attach(MODULE, TASK), RecipeError, r"attach fw\.capture\(model"),
    "attach: one alone": (lambda: fw.recover.attach(NETWORK, TASK, Logits(), steps=3), RecipeError,
                          r"given Logits.*e\.g\. \(distill\.Logits\(\)"),
    "load: nothing": (lambda: fw.load(None), FileError, r'fw\.load\("network\.fw"\)'),
    "load: a folder": (lambda: fw.load("."), FileError, r"\. is a folder; write .*fw\.load\('network\.fw'\)"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_no_network_task_or_folder_is_refused(name: str, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    call, error, said = GIVEN[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=said):
        call()
    assert not list(tmp_path.iterdir())


#: what stands beside a training after a cut, or what else it needs, and what is said before the cut
BEFORE: dict[str, tuple[Any, str]] = {
    "no file": (Logits(teacher="nope.fw"), "teacher='nope.fw': nope.fw: no such file"),
    "a folder": (Logits(teacher="."), "teacher='.': . is a folder"),
    "a number": (Logits(teacher=5), r"teacher=5; expected a Network.*Logits\(teacher=network\)"),
    "a class": (Logits(teacher=nn.Linear), r"expected a Network.*Logits\(teacher=network\)"),
    "it raises": (Logits(teacher=raising), r"the teacher \(function\) raised ValueError: no; "),
    "other classes": (Logits(teacher=wide), "the classes must be equal"),
    "several forms": (Logits(teacher=(wide, NETWORK)), r"these give float32\[.*, 6\] and float32\[.*, 5\]"),
    "arrays": (Logits(teacher=arrays), "the teacher gives no floating tensor .*ndarray"),
    "nan": (Logits(teacher=nan), "the loss of distill.Logits is nan on the first batch.*the teacher"),
    "a cached function": (Logits(teacher=lambda x: NETWORK(x), cache="kept"), "a function cannot be cached"),
    "no axis": (Logits(axis=7), r"Logits\(axis=7\) names no axis of outputs \[.*\]; write Logits\(axis=1\)"),
    "one tensor": (Logits(output=1), "gives one tensor, and no output 1"),
    "no field": (Logits(output="shape"), "gives one tensor, and no output 'shape'"),
    "activations of a module": (Features(teacher=MODULE), r"teacher=fw\.capture\(module, inputs\)"),
    "activations of several": (Features(teacher=(NETWORK, NETWORK)), "one captured teacher"),
    "relations of a function": (Relations(teacher=raising), "one captured teacher"),
    "activations of no file": (Features(teacher="nope.fw"), "teacher='nope.fw'"),
    "a bound of another form": (Regression(teacher=wide), "expected one shape"),
}


@pytest.mark.parametrize("name", BEFORE)
def test_what_cannot_stand_beside_a_training_is_told_before_the_first_step(name: str) -> None:
    beside, said = BEFORE[name]
    told: list[str] = []
    with pytest.raises(RecipeError, match=said):
        compress(Train(beside=(beside,)), progress=lambda what, done, total, figures: told.append(what))
    assert not told


def test_a_cache_that_is_a_file_is_told_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(FileError, match=r"step 2 \(recover\.Train\): .* cannot be kept in .*Logits\(cache=another"):
        compress(Train(distill=Logits(cache=str(tmp_path / "kept"))))
    assert (tmp_path / "kept").read_text() == "mine"


@pytest.mark.parametrize(("task", "steps", "said"), [
    (fw.Task(validation=TASK.validation, score=TASK.score), (fw.share.Codebook(compensate="obs"),),
     r"step 2 \(share\.Codebook\): this needs the task's calibration"),
    (fw.Task(train=TASK.train, loss=TASK.loss, test=[]), (Train(),), r"the test split holds no batches.*Task\(test=")])
def test_data_that_is_missing_is_told_before_the_first_step(task: fw.Task, steps: Any, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        compress(*steps, task=task)


def test_a_split_without_batches_is_named() -> None:
    task = fw.Task.classification(test=list)
    assert task.score is not None
    with pytest.raises(TaskError, match=r"the test split gave no batches; Task\(test=\.\.\.\) must start"):
        task.score(NETWORK, task.batches("test"))


def test_frozen_parameters_are_told_before_the_first_step() -> None:
    frozen = NETWORK.copy().requires_grad_(False)
    with pytest.raises(RecipeError, match=r"step 2 \(recover\.Train\): .*write model\.requires_grad_\(True\)"):
        compress(Train(), network=frozen)


# ---- outputs

def test_the_first_output_of_one_tensor_is_that_tensor() -> None:
    x = torch.randn(3, 4)
    assert fw.distill.outputs.choose(x, 0) is x
    assert fw.distill.outputs.choose((x, -x), 1).equal(-x)


def test_outputs_beyond_float16_are_cached_as_they_are(tmp_path: Path) -> None:
    large = torch.tensor([[1.5, 70000.0], [-2.25, 3.0], [float("inf"), 1.0]])
    teacher = fw.distill.teachers.started(NETWORK, None, torch.device("cpu"), "Logits")
    inputs = torch.randn(3, 12)
    for _ in range(2):
        cache = fw.distill.cache.OutputCache(tmp_path, teacher)
        assert cache.outputs(inputs, large).equal(large)  # type: ignore[union-attr]
        cache.flush()
    assert cache.outputs(inputs).equal(large)  # type: ignore[union-attr]


def test_a_term_that_is_not_finite_alone_is_named() -> None:
    wrong = float("nan")
    both = {"loss": wrong, "task": wrong, "distill.Logits": wrong}
    assert "its terms distill.Logits alone is not finite" in advice({**both, "task": 1.0}, 0.1)
    assert "Train(lr=0.01)" in advice(both, 0.1)
    assert "Train(lr=0.01)" in advice({"loss": wrong}, 0.1)


def test_scores_that_were_not_taken_are_no_loss_of_zero() -> None:
    found: Any = SimpleNamespace(step="original", score=None)
    with pytest.raises(TaskError, match=r"original was not scored; write Task\(score="):
        lost(found, found)


# ---- folders and files

OUT_OF_PLACE: dict[str, Callable[..., Any]] = {
    "compress": lambda out, **options: compress(out=out, **options),
    "search": lambda out, task=TASK, **options: fw.search(NETWORK, task, BUDGET, out=out, trials=1, seconds=0.01,
                                                          **options),
    "tune": lambda out, task=TASK, **options: fw.tune(NETWORK, task, [fw.recover.Train(epochs=1)],
                                                      {"1.lr": (0.01, 0.1)}, out=out, trials=1, seconds=0.01,
                                                      **options)}


@pytest.mark.parametrize(("kind", "other"), list(itertools.permutations(JOBS, 2)))
def test_the_folder_of_another_kind_of_job_is_refused(kind: str, other: str, tmp_path: Path) -> None:
    sign = tmp_path / JOBS[other]
    sign.parent.mkdir(exist_ok=True)
    sign.write_text("{}")
    with pytest.raises(RecipeError, match=r"holds the state of another job .*out=another folder, or resume=False"):
        OUT_OF_PLACE[kind](tmp_path)
    assert sign.read_text() == "{}"
    with pytest.raises(TaskError, match="the first batch"):  # nothing is cleared for a call that goes wrong
        OUT_OF_PLACE[kind](tmp_path, task=UNFIT, resume=False)
    assert sign.read_text() == "{}"
    check_alone(tmp_path, kind, resume=False)
    assert not sign.exists()
    check_alone(tmp_path, kind, resume=True)


@pytest.mark.parametrize(("begins", "said"), [
    (b"\x08\x0a\x12\x07pytorch" + bytes(90), "looks like an ONNX file"), (b"\x93FWZ\r\n\x1a" + bytes(90), "an archive"),
    (b"PK\x03\x04" + bytes(90), "holds a pickle"),
    (b"hello, this is a text" + bytes(90), "is no featherweight file, or a damaged one")])
def test_files_of_another_kind_are_told_by_what_they_look_like(begins: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "some.fw").write_bytes(begins)
    with pytest.raises(FileError, match=said):
        fw.load(tmp_path / "some.fw")


def test_a_file_that_cannot_be_written_is_named_and_not_its_neighbour(tmp_path: Path) -> None:
    NETWORK.save(tmp_path / "network.fw")
    fw.codec.pack(tmp_path / "network.fw", tmp_path / "network.fwz")
    for place, said in ((tmp_path, "is a folder; write the name of a file"), (tmp_path / "a" / "b", "a/b'")):
        with pytest.raises(OSError, match=said) as caught:
            fw.codec.unpack(tmp_path / "network.fwz", place)
        assert ".part" not in str(caught.value)


@pytest.mark.parametrize(("removed", "said"), [(True, "nothing is kept, as the job has no out"),
                                               (False, "what was finished is kept")])
def test_files_that_cannot_be_written_are_told_with_what_is_kept(removed: bool, said: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=said), _stops_told(tmp_path / "out" / "state", removed):
        raise OSError("full")


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_bfloat16_network_is_refused_in_words(target: str) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    network = fw.capture(nn.Linear(12, 5).bfloat16().eval(), torch.randn(2, 12).bfloat16())
    batches = [(torch.randn(4, 12).bfloat16(), torch.zeros(4).long())]
    with pytest.raises(FeatherweightError, match=r"bfloat16, .*fw\.capture\(model\.float\(\), inputs\.float\(\)\)"):
        fw.measure.measure(network, fw.Task(validation=batches), target, seconds=0.01)


def test_the_package_runs_as_a_module() -> None:
    found = subprocess.run([sys.executable, "-m", "featherweight", "--version"], capture_output=True, text=True,
                           check=True)
    assert found.stdout.strip() == fw.__version__
