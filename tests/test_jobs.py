"""Jobs as people run them: other data in the same folder, damage, kills at any point, two at once, errors of one's own.

What went wrong once is a test here; a kill is an exception at a file operation, after which no other one works.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import graph_module

import featherweight as fw
from featherweight.cli.flags import in_flags
from featherweight.cli.progress import Clock, duration
from featherweight.errors import FileError, RecipeError, TaskError
from featherweight.measure import Latency, Ratio, paired
from featherweight.recipe import gauge
from featherweight.recipe.files import State
from featherweight.recipe.mark import function_mark
from featherweight.report import render
from featherweight.report.shape import check_shape
from killing import FAMILIES, KILL, Killed, check
from test_recipe import Named, Nudge, Scale, assert_same, batches, squeeze, task, tiny

torch.set_num_threads(1)
ONE = fw.Recipe([Scale()])


def flipped(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in batches(seed):
        yield x, 2 - y


# ---- the same folder with another task

@pytest.mark.parametrize(("key", "other", "said"), [
    ("validation", {"validation": lambda: flipped(3)}, "validation: its first batches have other targets"),
    ("train", {"train": lambda: batches(7)}, "train: its first batches have other inputs and other targets"),
    ("calibration", {"calibration": None}, "calibration"),
    ("train", {"train": lambda: ((x[:8], y[:8]) for x, y in batches(1))}, r"were \['float32\[16, 4\] -> int64"),
    ("loss", {"loss": lambda o, t: 2 * nn.functional.cross_entropy(o, t)}, "loss: torch.nn.functional.cross_entropy"),
    ("score", {"score": fw.scores.top5}, r"top1 -> .*top5"),
    ("score_name", {"score_name": "accuracy"}, "score_name: 'top1' -> 'accuracy'"),
])
def test_another_task_in_the_same_folder_is_refused_with_what_changed(tmp_path: Path, key: str, other: Any,
                                                                      said: str) -> None:
    squeeze(tiny(), task(), ONE, out=tmp_path)
    with pytest.raises(RecipeError, match=rf"\(other: [a-z_, ]*{key}.*\).*out=another folder\), or resume=False"
                       ) as caught:
        squeeze(tiny(), task(**other), ONE, out=tmp_path)
    assert re.search(said, str(caught.value)), caught.value


@pytest.mark.parametrize(("options", "said"), [
    ({"seconds": 0.03}, r"other: seconds\) \(seconds: 0\.02 -> 0\.03"), ({"memory": True}, "memory: False -> True"),
    ({"threads": 2}, "threads: 1 -> 2")])
def test_other_options_are_refused(tmp_path: Path, options: Any, said: str) -> None:
    squeeze(tiny(), task(), ONE, out=tmp_path)
    with pytest.raises(RecipeError, match=said):
        squeeze(tiny(), task(), ONE, out=tmp_path, **options)


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeeze(tiny(), task(), ONE, out=tmp_path)
    monkeypatch.setattr("featherweight.recipe.mark.__version__", "9.9")
    with pytest.raises(RecipeError, match=rf"versions: featherweight {re.escape(fw.__version__)} -> 9\.9"):
        squeeze(tiny(), task(), ONE, out=tmp_path)


def test_another_test_split_is_refused(tmp_path: Path) -> None:
    squeeze(tiny(), task(test=lambda: batches(4)), ONE, out=tmp_path)
    with pytest.raises(RecipeError, match="test: its first batches have other targets"):
        squeeze(tiny(), task(test=lambda: flipped(4)), ONE, out=tmp_path)


def test_a_split_that_shuffles_is_the_same_split(tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(torch.cat([x for x, _ in batches(1)]), torch.cat([y for _, y in batches(1)]))
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    first = squeeze(tiny(), task(train=loader), ONE, out=tmp_path)
    torch.rand(3)
    assert squeeze(tiny(), task(train=loader), ONE, out=tmp_path).notes == first.notes
    own = np.random.default_rng(0)
    restless = task(train=lambda: [(torch.from_numpy(own.normal(size=(4, 4))).float(), torch.zeros(4).long())] * 3)
    squeeze(tiny(), restless, ONE, out=tmp_path / "restless")
    again = squeeze(tiny(), restless, ONE, out=tmp_path / "restless")
    assert any("the train split gives other first batches at every pass" in note for note in again.notes)


def test_a_function_is_known_by_what_it_does() -> None:
    def made(by: float) -> Any:
        return lambda o, t: by * nn.functional.cross_entropy(o, t)

    losses = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(weight=torch.ones(3))
    marks = [function_mark(f) for f in (made(1.0), made(2.0), *losses, fw.scores.top1, fw.scores.top5)]
    assert len(set(marks)) == len(marks)
    assert function_mark(made(1.0)) == marks[0]
    code = ("import torch, featherweight as fw\nfrom featherweight.recipe.mark import function_mark\n"
            "print(function_mark(fw.scores.mean_iou), function_mark(torch.nn.CrossEntropyLoss()))")
    source = str(Path(fw.__file__).parents[1])
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                           env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": source}).stdout
    assert found == f"{function_mark(fw.scores.mean_iou)} {marks[2]}\n", "the same in another process"


# ---- damage

def test_the_recipe_that_a_job_leaves_gives_the_same_network_elsewhere(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """``out/recipe.toml`` names every option, also those at their defaults, and another folder."""
    (tmp_path / "again_models.py").write_text(dedent("""
        from test_recipe import task, tiny
        def net(): return tiny()
        def data(): return task()
        """))
    (tmp_path / "job.toml").write_text(dedent("""
        [model]
        factory = "again_models:net"
        [task]
        factory = "again_models:data"
        [compress]
        seconds = 0.01
        seed = 5
        [[steps]]
        kind = "prune.Weights"
        sparsity = 0.5
        [[steps]]
        kind = "recover.Train"
        lr = 0.05
        """))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    fw.Job.from_toml("job.toml").run()
    text = (tmp_path / "out" / "recipe.toml").read_text()
    again = fw.Job.from_toml(tmp_path / "out" / "recipe.toml")
    assert Path(again.options.out).name == "out-again"
    for step, table in zip(again.recipe.steps, tomllib.loads(text)["steps"], strict=True):
        assert {f.name for f in dataclasses.fields(step)} <= set(table), "no default is left to the next version"
    again.run()
    assert (tmp_path / "out-again" / "network.fw").read_bytes() == (tmp_path / "out" / "network.fw").read_bytes()


def test_a_damaged_deployed_file_is_exported_and_measured_anew(tmp_path: Path) -> None:
    first = squeeze(tiny(), task(), ONE, out=tmp_path)
    whole = (tmp_path / "model.here").read_bytes()
    (tmp_path / "state" / "step_1" / "model.here").write_bytes(b"garbage")
    with pytest.warns(UserWarning, match=r"step_1/model\.here is not the file that was measured"):
        again = squeeze(tiny(), task(), ONE, out=tmp_path)
    assert (tmp_path / "model.here").read_bytes() == whole
    assert again.trail[1].score == first.trail[1].score


@pytest.mark.parametrize("name", ["network.fw", "plan.safetensors"])
def test_another_file_of_the_state_that_is_damaged_is_told(tmp_path: Path, name: str) -> None:
    squeeze(tiny(), task(), ONE, out=tmp_path)
    file = tmp_path / "state" / "step_1" / name
    held = bytearray(file.read_bytes())
    held[-3] ^= 1  # one bit of one weight: still a file that can be read
    file.write_bytes(held)
    with pytest.raises(FileError, match=rf"{name} is not the file that was written; .*resume=False\) to start over"):
        squeeze(tiny(), task(), ONE, out=tmp_path)


@pytest.mark.parametrize("text", [
    pytest.param("[" * 100_000, id="deep"), "null", "[]", '"x"', '{"files": {}, "value": null}', "{", "",
    '{"files": {"a": 1}, "value": []}', '{"files": {}, "value": {"step": 3}}'])
def test_state_files_of_wrong_json_are_answered_in_words(tmp_path: Path, text: str) -> None:
    squeeze(tiny(), task(test=lambda: batches(4)), ONE, out=tmp_path)
    for file in sorted((tmp_path / "state").rglob("*.json")):
        if file.name == "decisions.json" and '"value": {"step"' in text:
            continue
        kept = file.read_text()
        file.write_text(text)
        with pytest.raises(FileError, match=r"write compress\(\.\.\., resume=False\) to start over"):
            squeeze(tiny(), task(test=lambda: batches(4)), ONE, out=tmp_path)
        file.write_text(kept)
    squeeze(tiny(), task(test=lambda: batches(4)), ONE, out=tmp_path)


def test_a_training_whose_files_are_damaged_is_told_or_begun_anew(tmp_path: Path) -> None:
    recipe = [fw.recover.Train(epochs=2, lr=0.05)]
    state = tmp_path / "state" / "step_1"

    def kill(what: str, done: float, *rest: Any) -> None:
        if (what, done) == ("recover.Train", 8):
            raise Killed

    with pytest.raises(Killed):
        squeeze(tiny(), task(), recipe, out=tmp_path, progress=kill)
    held = bytearray((state / "checkpoint.safetensors").read_bytes())
    held[-3] ^= 1  # one bit of one number
    (state / "checkpoint.safetensors").write_bytes(held)
    with pytest.warns(UserWarning, match="do not match its checksum.*starting from the beginning"):
        resumed = squeeze(tiny(), task(), recipe, out=tmp_path)
    assert_same(resumed.network, squeeze(tiny(), task(), recipe).network)
    for text in ("null", '{"1": 3}', '{"1": {"loss": "low"}}', "{"):
        (state / "terms.json").write_text(text)
        with pytest.raises(FileError, match=r"terms\.json .*resume=False\) to start over"):
            squeeze(tiny(), task(), recipe, out=tmp_path)


EDITS: list[tuple[tuple[Any, ...], Any]] = [
    (("trail",), 3), (("trail",), {"a": 1}), (("trail", 0), "x"), (("trail", 0, "params"), "many"),
    (("trail", 0, "latency"), 3), (("trail", 0, "latency", "median_s"), "fast"), (("trail", 1, "score"), [1]),
    (("trail", 1, "beside"), []), (("trail", 1, "ratios", "original"), {}), (("plans",), [1]),
    (("plans", 0, "skipped"), 5), (("layers",), [1]), (("layers", "before"), "x"), (("flags",), 1), (("notes",), {}),
    (("machine",), 4), (("recipe_toml",), 4), (("final",), 1)]


def test_a_malformed_result_is_told_where(tmp_path: Path) -> None:
    squeeze(tiny(), task(), ONE, out=tmp_path)
    values = json.loads((tmp_path / "result.json").read_text())
    check_shape(values, "result.json")
    for path, value in EDITS:
        wrong = json.loads(json.dumps(values))
        place = wrong
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises(FileError, match=rf"result\.json is damaged: {path[0]}.*compress wrote"):
            check_shape(wrong, "result.json")


# ---- kills

def test_a_kill_at_any_file_operation_changes_nothing(tmp_path: Path) -> None:
    check(FAMILIES["steps"], tmp_path, 31)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["steps", "training", "low rank and codebooks"])
def test_a_kill_before_and_after_every_file_operation_changes_nothing(tmp_path: Path, name: str) -> None:
    check(FAMILIES[name], tmp_path, 1)


def test_a_training_killed_within_an_epoch_tells_the_losses_of_all_its_steps(tmp_path: Path) -> None:
    recipe = [fw.recover.Train(epochs=2, lr=0.05, distill=fw.distill.Logits(), checkpoint_every=0.0)]
    def kill(when: int, what: str, done: float, *rest: Any) -> None:
        if (what, done) == ("recover.Train", when):
            raise Killed

    for when in (3, 9):
        with pytest.raises(Killed):
            squeeze(tiny(), task(), recipe, out=tmp_path, progress=functools.partial(kill, when))
    whole = squeeze(tiny(), task(), recipe)
    assert squeeze(tiny(), task(), recipe, out=tmp_path).losses == whole.losses
    assert len(whole.losses["1"]["loss"]) == 2


def test_a_kill_in_claiming_or_clearing_leaves_a_folder_that_is_accepted(tmp_path: Path) -> None:
    old, new = {"format": 3, "recipe": ["old"]}, {"format": 3, "recipe": ["new"]}

    def claimed(out: Path, mark: Any) -> State:
        state = State(out / "state")
        with state.held():
            state.claim(mark, resume=False)
        return state

    for count in itertools.count():
        out = tmp_path / str(count)
        (claimed(out, old).step(1) / "network.fw").write_bytes(b"old")
        KILL.arm(out, count)
        try:
            claimed(out, new)
        except Killed:
            KILL.folder = ""
        else:
            assert count > 10
            break
        finally:
            KILL.folder = ""
        claimed(out, new)
        assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*")) == ["state", "state/fingerprint.json"]


def test_a_killed_measurement_keeps_what_it_has(tmp_path: Path) -> None:
    scored = [0]

    def score(predict: Any, given: Any) -> float:
        scored[0] += 1
        return 1.0

    work = task(score=score)
    squeeze(tiny(), work, ONE, out=tmp_path / "whole")
    whole = scored[0]
    scored[0] = 0
    out, count, kills = tmp_path / "killed", 0, 0
    while True:  # every call gets five file operations further than the one before had come
        KILL.arm(out, count + 5)
        try:
            squeeze(tiny(), work, ONE, out=out)
            break
        except Killed:
            kills, count = kills + 1, count + 5
        finally:
            KILL.folder = ""
    assert kills > 5
    trials = kills  # each call tries the score once before it begins
    assert scored[0] - trials <= whole + 2, "a score that was kept is not taken again"


# ---- two at once, no room, no rights

HOLD = """
import sys, time
from pathlib import Path
from featherweight.recipe.files import State
with State(Path(sys.argv[1]) / "state").held():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_names_the_process_and_is_free_after_its_kill(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RecipeError, match=rf"worked in by process {other.pid} on .*out=another folder"):
            squeeze(tiny(), task(), ONE, out=tmp_path)
        other.kill()
    squeeze(tiny(), task(), ONE, out=tmp_path)


def test_several_processes_write_one_file(tmp_path: Path) -> None:
    code = ("import sys\nfrom featherweight.files import written_whole\nfor i in range(20):\n"
            "    with written_whole(sys.argv[1]) as part: part.write_text(sys.argv[2] * 100_000)")
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "file.txt"), str(i)]) for i in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert (tmp_path / "file.txt").read_text() in ("0" * 100_000, "1" * 100_000)
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_disk_that_is_full_is_told_and_the_job_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(FileError, match=r"No space left on device.*what was finished is kept.*to go on"):
            squeeze(tiny(), task(), ONE, out=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 100})())
        with pytest.raises(RecipeError, match=r"may need .* GB in .*are free; write another out"):
            squeeze(tiny(), task(), ONE, out=tmp_path)
    squeeze(tiny(), task(), ONE, out=tmp_path)


@pytest.mark.parametrize("when", ["step 1", "recover.Train", "measure recover.Train", "latencies"])
def test_a_folder_that_is_removed_meanwhile_is_told_and_made_anew(tmp_path: Path, when: str) -> None:
    recipe, removed = [Scale(), fw.recover.Train(epochs=2, lr=0.05)], [0]

    def remove(what: str, *rest: Any) -> None:
        if what.startswith(when) and not removed[0]:
            removed[0] += 1
            shutil.rmtree(tmp_path / "out")

    with pytest.raises(FileError):
        squeeze(tiny(), task(), recipe, out=tmp_path / "out", progress=remove)
    assert removed
    squeeze(tiny(), task(), recipe, out=tmp_path / "out")


def test_a_job_without_a_folder_leaves_what_others_write_beside_it(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "other.holder.4711-0123abcd.part").write_text("of another process")
    squeeze(tiny(), task(), ONE)
    left = [p.name for p in tmp_path.iterdir() if not p.name.startswith("torch")]
    assert left == ["other.holder.4711-0123abcd.part"]


# ---- errors of one's own functions

def raising(*arguments: Any) -> Any:
    raise KeyError("label")


def at_the_second(predict: Any, given: Any) -> float:
    for number, _ in enumerate(given):
        if number:
            raise KeyError("label")
    return 1.0


@pytest.mark.parametrize(("more", "message"), [
    ({"loss": lambda o, t: nn.functional.cross_entropy(o, t, reduction="none")},
     r"your loss gave float32\[16\] on the train split; expected a scalar tensor"),
    ({"loss": lambda o, t: 1.0}, r"your loss gave 1\.0 \(float\) on the train split"),
    ({"loss": raising}, r"on the train split: your loss raised KeyError: 'label' \(for an output float32\[16, 3\]"),
    ({"score": lambda predict, given: None}, r"your score function gave None on the validation split"),
    ({"score": lambda predict, given: "good"}, r"gave 'good' \(str\) on the validation split.*expected a number"),
    ({"score": raising}, "your score function raised KeyError: 'label' on the validation split"),
    ({"score": at_the_second}, "raised KeyError: 'label' on the validation split, batch 1"),
    ({"score": lambda predict, given: float("nan")}, "your score gave nan on the validation split; expected a finite"),
    ({"train": lambda: [(torch.randn(4, 7), torch.zeros(4).long())]},
     r"cannot be called with the first batch of the train split \(float32\[4, 7\]\)"),
    ({"validation": list}, r"the validation split gave no batches"),
    ({"validation": iter(list(batches(3)))}, "list_iterator, which can be gone through only once"),
    ({"train": lambda: [(x.double(), y) for x, y in batches(1)]}, r"train split.*float64"),
])
def test_what_a_users_function_does_wrong_is_told_before_the_first_step(more: Any, message: str) -> None:
    Scale.planned.clear()
    with pytest.raises(TaskError, match=message) as caught:
        squeeze(tiny(), task(**more), ONE)
    assert not Scale.planned
    if "KeyError" in message:
        assert isinstance(caught.value.__cause__, KeyError), "their own traceback is kept"


NO_TARGETS = [(x, None) for x, _ in batches(2)]


@pytest.mark.parametrize(("step", "more", "message"), [
    (fw.prune.Channels(macs=0.5, score="taylor"), {"calibration": NO_TARGETS},
     r"on the calibration split: your loss raised TypeError.* and a target None\); give pairs \(inputs, target\)"),
    (fw.prune.Weights(score="fisher"), {"calibration": NO_TARGETS}, r"on the calibration split: your loss"),
    (fw.share.Codebook(importance="fisher"), {"calibration": NO_TARGETS}, r"on the calibration split: your loss"),
    (fw.recover.Train(), {"train": NO_TARGETS}, r"on the train split: your loss .* give pairs"),
    (fw.recover.Train(), {"train": None}, r"step 2 \(recover\.Train\): this needs the task's train and none was given"),
    (fw.prune.Weights(score="taylor"), {"loss": None}, r"step 2 \(prune\.Weights\): this needs the task's loss"),
    (fw.prune.Weights(score="wanda"), {"calibration": None}, "this needs the task's calibration and none was given"),
])
def test_what_a_later_step_needs_of_the_task_is_asked_before_the_first(step: Any, more: Any, message: str) -> None:
    Scale.planned.clear()
    with pytest.raises(TaskError, match=message):
        squeeze(tiny(), task(**more), [Scale(), step])
    assert not Scale.planned


def test_a_loss_that_takes_no_target_needs_none() -> None:
    calm = task(calibration=NO_TARGETS, loss=lambda output, target: output.square().mean())
    squeeze(tiny(), calm, [fw.prune.Weights(sparsity=0.5, score="taylor")])


@pytest.mark.parametrize("split", [lambda: list(batches(1)), lambda: [(x.numpy(), y.numpy()) for x, y in batches(1)],
                                   lambda: torch.utils.data.DataLoader(list(batches(1)), batch_size=None)])
def test_splits_of_every_kind_train(split: Any) -> None:
    result = squeeze(tiny(), task(train=split()), [fw.recover.Train(epochs=1, lr=0.05)])
    assert_same(result.network, squeeze(tiny(), task(train=lambda: batches(1)), [fw.recover.Train(lr=0.05)]).network)


def test_a_loss_of_logits_gets_them_from_outputs_that_hold_several() -> None:
    network = fw.capture(Named(), torch.randn(2, 4))
    result = squeeze(network, task(), [fw.recover.Train(epochs=1, lr=0.1)])
    own = squeeze(network, task(loss=lambda o, t: nn.functional.cross_entropy(o.logits, t)),
                  [fw.recover.Train(epochs=1, lr=0.1)])
    assert_same(result.network, own.network)


# ---- numbers that are none

@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(wrong: float) -> None:
    network = tiny()
    with torch.no_grad():
        network.tensor("0.weight")[0, 0] = wrong
    with pytest.raises(RecipeError, match=r"'0\.weight' holds 1 of 64 numbers that are not finite"):
        squeeze(network, task(), ONE)
    with pytest.raises(RecipeError, match=r"after step 1 \(test\.Nudge\): '0\.bias' holds"):
        squeeze(tiny(), task(), [Nudge(by=wrong)])


def test_outputs_that_are_no_longer_finite_are_flagged() -> None:
    result = squeeze(tiny(), task(score=lambda predict, given: 1.0), [Scale(by=1e30), Scale("2.weight", by=1e30)])
    (found,) = [flag for flag in result.flags if " gives " in flag and "where there were" in flag]
    assert re.match(r"step 2 \(test\.Scale\) gives \d+ numbers that are not finite .* where there were 0", found)


def test_true_is_no_number() -> None:
    with pytest.raises(RecipeError, match="macs is True"):
        fw.Recipe([fw.prune.Channels(macs=True)])
    with pytest.raises(RecipeError, match="threads=True"):
        squeeze(tiny(), task(), ONE, threads=True)


def test_options_are_checked_when_the_recipe_is_made() -> None:
    with pytest.raises(RecipeError, match="did you mean 'magnitude'"):
        fw.Recipe([fw.recover.Train(epochs=10), fw.prune.Weights(score="magnitud")])


# ---- one set of figures

def test_files_are_timed_once_and_every_place_says_the_same(tmp_path: Path) -> None:
    result = squeeze(tiny(), task(test=lambda: batches(4)), [Scale(), Nudge()], out=tmp_path)
    first, *rest = result.trail
    assert result.final is not None
    assert result.final.before.latency == first.latency
    assert result.final.after.latency == result.trail[-1].latency
    for index, row in enumerate(rest, 1):
        assert row.beside["original"] == first.latency
        assert row.latency is not None
        assert row.beside.get("before", first.latency) == result.trail[index - 1].latency
        assert row.ratios.keys() == row.beside.keys()
        assert row.ratios["original"].low <= row.ratios["original"].median <= row.ratios["original"].high


def test_a_verdict_needs_ratios_beyond_doubt() -> None:
    assert (Ratio(1.2, 1.1, 1.3).verdict, Ratio(0.8, 0.7, 0.9).verdict) == ("faster", "slower")
    assert {Ratio(1.5, 0.9, 2.0).verdict, Ratio(1.02, 1.01, 1.03).verdict, Ratio(0.98, 0.97, 0.99).verdict} == {""}
    few = paired([2.0] * 8 + [0.5] * 3, [1.0] * 11)
    assert few.median == 2
    assert few.verdict == "", "eleven rounds of a coin are often as uneven"
    generator = np.random.default_rng(0)
    for rounds in (11, 40, 400):  # equal files on a machine that is disturbed now and then
        draws = generator.random((300, 2, 2, rounds))
        found = [paired(*np.where(disturbed < 0.3, 3.0, 1.0) + 0.02 * noise) for disturbed, noise in draws]
        assert [r.verdict for r in found if r.verdict] == []


def test_the_page_says_that_no_difference_was_measured() -> None:
    def row(step: str, median: float, ratio: tuple[float, float, float] | None) -> dict[str, Any]:
        latency = {"median_s": median, "q1_s": 0.9 * median, "q3_s": 1.1 * median, "rounds": 99}
        ratios = {} if ratio is None else {"original": dict(zip(("median", "low", "high"), ratio, strict=True))}
        return {"step": step, "file_bytes": 1000, "params": 1, "nonzeros": 1, "latency": latency, "ratios": ratios}

    doubtful = render({"trail": [row("original", 282e-6, None), row("x", 299e-6, (0.94, 0.8, 1.1))]})
    assert "nothing became smaller or faster" in doubtful
    assert "no difference measured" in doubtful
    assert "faster" not in doubtful.partition('class="tiles"')[2].partition("</dl>")[0]
    sure = render({"trail": [row("original", 282e-6, None), row("x", 235e-6, (1.2, 1.15, 1.25))]})
    assert "1.20\u00a0×\u00a0faster" in sure


def test_files_that_do_not_fit_into_memory_together_are_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauge, "available", lambda: 1000.0)
    result = squeeze(tiny(), task(), [Scale(), Nudge()])
    assert [row.latency is not None for row in result.trail] == [True, False, True]
    assert any("step 1 was not timed" in note for note in result.notes)


def test_a_busy_machine_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter([0.0, 1e9])
    monkeypatch.setattr("featherweight.measure.timing.waited_s", lambda: next(waits))
    result = squeeze(tiny(), task(), ONE)
    assert isinstance(result.trail[0].latency, Latency)
    assert result.trail[0].latency.waiting == 1
    assert any("busy machine: for 100 % of that time" in note for note in result.notes)


# ---- what is seen meanwhile

def test_the_time_left_is_told_as_far_as_it_is_known() -> None:
    now = [0.0]
    clock = Clock(lambda: now[0])

    def after(seconds: float, what: str, done: float, total: float, **facts: float) -> None:
        now[0] += seconds
        clock.tell(what, done, total, facts)

    after(0, "measure original", 0, 2)
    after(10, "measured original", 0, 2)
    after(0, "step 1: recover.Train", 0, 2)
    assert clock.left() is None
    after(1, "recover.Train", 1, 11, epoch=1)
    after(10, "recover.Train", 6, 11, epoch=2)
    assert clock.left() == pytest.approx(10)
    assert clock.left_in_all() == (pytest.approx(30), False), "the second step may take any time"
    assert clock.line() == ("step 1: recover.Train, epoch 2, 6 of 11, 11 s so far, about 10 s left in it, "
                            "at least 30 s left in all")
    after(10, "measure recover.Train", 1, 2)
    after(10, "measured recover.Train", 1, 2)
    after(0, "step 2: recover.Train", 1, 2)
    after(0, "recover.Train", 0, 10)
    after(2, "recover.Train", 1, 10)
    assert clock.left_in_all() == (pytest.approx(18 + 10), True)
    after(18, "measure recover.Train", 2, 2)
    after(10, "measured recover.Train", 2, 2)
    assert clock.share < 1, "the test split and the latencies are to come"
    resumed = Clock(lambda: now[0])
    resumed.tell("measure latencies", 2, 2, {})
    assert resumed.share == 6 / 7, "a job that goes on tells the end alone"
    assert [duration(s) for s in (3.4, 100, 7500)] == ["3 s", "2 min", "2 h 5 min"]


def test_a_training_tells_its_epoch() -> None:
    told: list[tuple[float, float]] = []

    def listen(what: str, done: float, total: float, figures: Mapping[str, float]) -> None:
        if what == "recover.Train":
            told.append((done, figures["epoch"]))

    squeeze(tiny(), task(), [fw.recover.Train(epochs=2, lr=0.05)], progress=listen)
    assert told == [(i, 1 if i <= 6 else 2) for i in range(1, 13)]


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    def stop(what: str, *rest: Any) -> None:
        if what.startswith("step"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        squeeze(tiny(), task(), ONE, out=tmp_path, progress=stop)
    assert any(f"kept in {tmp_path}: call compress" in note for note in caught.value.__notes__)
    squeeze(tiny(), task(), ONE, out=tmp_path)


def test_messages_speak_in_flags_on_the_command_line(tmp_path: Path) -> None:
    squeeze(tiny(), task(), ONE, out=tmp_path)
    with pytest.raises(RecipeError) as caught:
        squeeze(tiny(), task(), ONE, out=tmp_path, seed=1)
    assert "write --out another-folder, or --no-resume to start over" in in_flags(str(caught.value))
    (tmp_path / "state" / "step_0" / "measurement.json").write_text("null")
    with pytest.raises(FileError) as damaged:
        squeeze(tiny(), task(), ONE, out=tmp_path)
    assert "write --no-resume to start over" in in_flags(str(damaged.value))
    said = in_flags(f"{caught.value} {damaged.value}")
    assert not any(word in said for word in ("compress(", "resume=", "out="))


# ---- again and again in one process

def living() -> Counter[str]:
    """Objects of the library's own classes and of torch's export, by class."""
    gc.collect()
    kinds = (type(o) for o in gc.get_objects())
    return Counter(f"{k.__module__}.{k.__qualname__}" for k in kinds if isinstance(k.__module__, str) and
                   k.__module__.startswith(("featherweight.", "torch.fx.", "torch._subclasses.", "torch.export.")))


@pytest.fixture
def _no_logs() -> Iterator[None]:
    logging.disable(logging.CRITICAL)  # pytest keeps what torch tells its log, and all that it speaks of
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("_no_logs")
def test_a_process_that_compresses_again_and_again_does_not_grow(tmp_path: Path) -> None:
    def once() -> None:
        network = tiny()
        squeeze(network, task(), ONE, seconds=0.0)
        fw.deploy.target("onnxruntime").export(network, tmp_path / "model.onnx")

    seen: list[Counter[str]] = []
    for _ in range(4):
        once()
        seen.append(living())
        seen[-1]["sources of graphs"] = len(graph_module._loader.eval_cache)
    kinds = set().union(*seen)
    assert {k for k in kinds if all(a[k] < b[k] for a, b in itertools.pairwise(seen))} == set(), "grew at every call"


def test_eight_threads_call_one_network_and_one_runner(tmp_path: Path) -> None:
    network, runtime = tiny(), fw.deploy.target("onnxruntime")
    runtime.export(network, tmp_path / "model.onnx")
    runner = runtime.load(tmp_path / "model.onnx", like=network.signature)
    inputs = [torch.randn(1 + i % 5, 4) for i in range(100)]
    with torch.no_grad():
        wanted = [network(x) for x in inputs]
    with ThreadPoolExecutor(8) as threads:
        assert all(map(torch.equal, wanted, threads.map(torch.no_grad()(network), inputs)))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(wanted, threads.map(runner, inputs), strict=True))
