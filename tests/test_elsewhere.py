"""A device that is not this machine: what is carried there, timed there without torch, and read back."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import featherweight as fw
from featherweight.axes.groups import axis_groups
from featherweight.cli.app import app
from featherweight.errors import FileError, RecipeError, Untimed
from featherweight.files import checksum
from featherweight.judge import time_them
from featherweight.judge.elsewhere import Elsewhere, Unmeasured, given, known_here, times_of
from featherweight.judge.figures import place
from featherweight.judge.layer_times import TimedLayer
from featherweight.judge.widths import LatencyTable, timed_layers
from featherweight.prune.channels.costs import everything

DEVICE = "abc Processor 9 onnxruntime 1.20.0 threads=1 "
NETWORK = fw.capture(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval(), torch.randn(2, 8))
#: a Python in which torch and featherweight cannot be imported, that runs the script which is its argument
BARE = """
import runpy, sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "featherweight", "onnx"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refused())
runpy.run_path(sys.argv[1], run_name="__main__")
assert not {"torch", "featherweight", "onnx"} & set(sys.modules)
"""


def seconds(layer: TimedLayer) -> float:
    """A device whose layers take so long."""
    return 1e-8 + 1e-6 * math.prod(-(-s // 16) for s in layer.weight[:2])


def timed(folder: Path, device: str = DEVICE) -> None:
    """Stands for the device: layers take ``seconds``, networks so long as they have bytes."""
    manifest, times = json.loads((folder / "manifest.json").read_text()), folder / "times.json"
    files = manifest["files"]
    size = {name: (folder / entry["file"]).stat().st_size for name, entry in files.items()}
    found = json.loads(times.read_text()) if times.exists() else {}
    for name, entry in files.items():
        first = entry.get("beside")
        if name == time_them.NOTHING:
            continue
        if first is None:
            found[device + name] = seconds(TimedLayer("", tuple(json.loads(name)[1]), (), False))
        elif first == name:
            found[device + name] = 1e-3
        else:
            found[f"{device}{first} {name}"] = size[name] / size[first]
    times.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of layers that a device timed."""
    folder = tmp_path_factory.mktemp("bench")
    written = fw.balance.bench_table(NETWORK, fw.Task(), folder)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files.keys() - {time_them.NOTHING} < files.keys()
    assert len(files) == written + 1
    timed(folder)
    return folder


def test_the_script_needs_no_torch_goes_on_where_it_was_and_its_figures_are_read(tmp_path: Path) -> None:
    first, second = (TimedLayer("aten.linear.default", (4, i), (1,), True) for i in (8, 12))
    device = Elsewhere(tmp_path, "onnxruntime")
    device.begin()
    device.add_layers({first.key(): first})
    file, other = tmp_path / "a.onnx", tmp_path / "b.onnx"
    runtime = fw.deploy.target("onnxruntime")
    runtime.export(NETWORK, file)
    runtime.export(fw.prune.Channels(macs=0.5).plan(NETWORK, fw.Task()).apply(NETWORK), other)
    item = NETWORK.signature.inputs[0].name
    device.add_networks(file, [other], {item: np.zeros((1, 8), np.float32)})
    assert device.waiting() == 3

    def run() -> dict[str, float]:
        done = subprocess.run([sys.executable, "-I", "-c", BARE, str(tmp_path / "time_them.py")],
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found: dict[str, float] = json.loads((tmp_path / "times.json").read_text())
        return found

    there = run()
    here = place("onnxruntime", 1)
    assert there.keys() == {here + first.key(), here + checksum(file), f"{here}{checksum(file)} {checksum(other)}"}
    assert all(0 < figure < 10 for figure in there.values())
    Elsewhere(tmp_path, "onnxruntime").add_layers({second.key(): second})
    assert {name: run()[name] for name in there} == there  # what was timed stays
    back = Elsewhere(tmp_path, "onnxruntime")
    assert back.waiting() == 0
    assert back.device == here.strip()
    assert back.share(file, other) == there[f"{here}{checksum(file)} {checksum(other)}"]
    assert back.seconds(file) == there[here + checksum(file)]
    assert second.key() in back.known


def test_the_script_is_written_for_older_pythons() -> None:
    compile(Path(time_them.__file__).read_text(), "time_them.py", "exec")
    import ast

    ast.parse(Path(time_them.__file__).read_text(), feature_version=(3, 9))


def test_figures_are_least_seconds_and_medians_of_shares() -> None:
    taken = {"a": [1.0, 3.0, 2.0], "b": [2.0, 3.0, 8.0]}
    assert time_them.figures("", {**taken, "nothing": [0.5, 0.25, 1.0]}) == {"a": 0.75, "b": 1.75}
    assert time_them.figures("", {**taken, "nothing": [0.99, 1.0, 1.0]})["a"] == 0.05  # next to nothing itself
    assert time_them.figures("a", taken) == {"a": 2.0, "a b": 2.0}


def test_plans_for_a_device_are_those_of_a_table_measured_here(bench: Path, tmp_path: Path) -> None:
    def timer(layers: Sequence[TimedLayer], target: str, threads: int) -> list[float]:
        return [seconds(layer) for layer in layers]

    axes = axis_groups(NETWORK)
    there = LatencyTable.measure(NETWORK, axes, times=bench)
    here = LatencyTable.measure(NETWORK, axes, path=tmp_path / "latency.json", timer=timer)
    assert [(t.node, t.widths, t.seconds.tolist(), t.step) for t in there.timings] \
        == [(t.node, t.widths, t.seconds.tolist(), t.step) for t in here.timings]
    assert there.cost(everything(axes)) == pytest.approx(sum(map(seconds, timed_layers(NETWORK)[0].values())))
    plan = fw.prune.Channels(latency=0.55, times=str(bench)).plan(NETWORK, fw.Task())
    assert here.cost(everything(axes)) * 0.55 >= sum(
        seconds(layer) for layer in timed_layers(plan.apply(NETWORK))[0].values())
    fw.factorize.LowRank(latency=0.9, form="auto", how="error", times=str(bench)).plan(NETWORK, fw.Task())


def test_a_worker_asks_for_what_it_may_not_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans made of given times alone, by and by, are those of a process that times when it needs to."""
    alone = [True]

    def timer(layers: Sequence[TimedLayer], target: str, threads: int) -> list[float]:
        assert alone[0], "nothing is timed beside others"
        return [seconds(layer) for layer in layers]

    def ready(step: Any) -> Any:
        while True:
            alone[0] = False
            try:
                with given(known_here("onnxruntime")):
                    return step.plan(NETWORK, fw.Task())
            except Unmeasured as wanted:
                alone[0] = True
                times_of("onnxruntime").times(list(wanted.layers.values()))

    monkeypatch.setattr("featherweight.judge.elsewhere.time_all", timer)
    for step in (fw.prune.Channels(latency=0.55), fw.factorize.LowRank(latency=0.9, form="auto", how="error")):
        monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "worker"))
        asked = ready(step)
        alone[0] = True
        monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "here"))
        assert asked == step.plan(NETWORK, fw.Task())


def test_what_a_step_misses_is_added_and_said(bench: Path, tmp_path: Path) -> None:
    other = fw.capture(nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4)).eval(), torch.randn(2, 8))
    Elsewhere(tmp_path, "onnxruntime").begin()
    step = fw.prune.Channels(latency=0.5, times=str(tmp_path))
    with pytest.raises(Untimed, match=r"\d+ files in .* are to be timed on the device.*python time_them.py"):
        step.plan(other, fw.Task())
    timed(tmp_path)
    assert step.plan(other, fw.Task()).keep


@pytest.mark.parametrize(("step", "said"), [
    (fw.prune.Channels(macs=0.5, times="there"), r'Channels\(latency=0.5, times="device"\)'),
    (fw.factorize.LowRank(times="there"), r'LowRank\(latency=0.5, times="device"\)'),
    (fw.prune.Channels(latency=0.5, times="there"), "featherweight bench-table MODEL --out there")])
def test_wrong_times_are_refused_with_a_line_to_write(step: Any, said: str) -> None:
    with pytest.raises(fw.errors.FeatherweightError, match=said):
        step.plan(NETWORK, fw.Task())


def test_tables_of_several_devices_and_of_other_targets_are_refused(bench: Path, tmp_path: Path) -> None:
    for target, threads in (("openvino", 1), ("onnxruntime", 2)):
        with pytest.raises(FileError, match="expected format 2"):
            Elsewhere(bench, target, threads).known  # noqa: B018
    Elsewhere(tmp_path, "onnxruntime").begin()
    layer = TimedLayer("aten.linear.default", (4, 8), (1,), True)
    for names in ([DEVICE, DEVICE.replace("9", "8")], [DEVICE.replace("threads=1", "threads=2")], ["nothing "]):
        (tmp_path / "times.json").write_text(json.dumps({name + layer.key(): 1.0 for name in names}))
        with pytest.raises(FileError, match="expected those of one device on 1 threads"):
            Elsewhere(tmp_path, "onnxruntime").known  # noqa: B018
    with pytest.raises(RecipeError, match="steps with a latency"):
        fw.balance.bench_table(NETWORK, fw.Task(), tmp_path, steps=(fw.prune.Channels(macs=0.5),))


def test_a_search_goes_on_with_what_the_device_says(bench: Path, tmp_path: Path) -> None:
    """The device times files by their bytes: what is found is the smallest file, whatever this machine says."""
    shutil.copytree(bench, tmp_path / "device")
    network, task, trips, found = NETWORK, data(), 0, None
    while found is None:
        try:
            found = fw.search(network, task, fw.Budget(latency="0.9 ms", score_drop=100.0), out=tmp_path / "out",
                              times=tmp_path / "device", families=("channels", "integers"), trials=5, seconds=0.01)
        except Untimed:
            trips += 1
            assert Elsewhere(tmp_path / "device", "onnxruntime").waiting() > 0
            timed(tmp_path / "device")
    assert 1 <= trips <= 3
    assert not any(t.failed for t in found.trials)
    assert not found.missed
    assert found.device == found.to_dict()["device"] == DEVICE.strip()
    assert all(t.shares["latency"] == pytest.approx(t.shares["file_bytes"]) for t in found.trials)
    assert found.chosen.shares["latency"] == min(t.shares["latency"] for t in found.trials) <= 0.9
    with pytest.raises(RecipeError, match="times"):
        fw.search(network, task, fw.Budget(latency=0.5), out=tmp_path / "out", seconds=0.01)
    assert 'times = "' in found.recipe.to_toml() or "channels" not in found.chosen.what


def test_the_command_writes_a_folder_and_a_search_that_waits_says_so(tmp_path: Path) -> None:
    NETWORK.save(tmp_path / "net.fw")
    out = tmp_path / "bench"
    said = CliRunner().invoke(app, ["bench-table", str(tmp_path / "net.fw"), "--out", str(out), "--json"])
    assert json.loads(said.stdout)["files"] == len(json.loads((out / "manifest.json").read_text())["files"]) - 1
    (tmp_path / "job.toml").write_text(f'[model]\nfile = "net.fw"\n[task]\nfactory = "test_elsewhere:data"\n'
                                       f'[goal]\nlatency = 0.5\ntimes = "{out.as_posix()}"\n')
    waits = CliRunner().invoke(app, ["search", str(tmp_path / "job.toml"), "--out", str(tmp_path / "out")])
    assert waits.exit_code == 1
    assert "are to be timed on the device" in waits.stderr
    assert "error" not in waits.stderr


def data() -> fw.Task:
    inputs = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    return fw.Task(calibration=[(inputs, torch.arange(8) % 4)], loss=nn.functional.cross_entropy, score=fw.scores.top1)
