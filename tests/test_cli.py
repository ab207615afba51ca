"""cli/: every command on real files, its JSON, its exit codes, its messages."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import featherweight as fw
from featherweight.cli import show
from featherweight.cli.app import app
from featherweight.demo import digits
from featherweight.demo import job as demo_module

torch.set_num_threads(1)

MODULE = '''
import torch
from torch import nn
import featherweight as fw


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def pair():
    return net(), torch.randn(2, 1, 8, 8)


def task():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 1, 8, 8, generator=generator)
    y = torch.randint(0, 3, (24,), generator=generator)
    split = lambda: [(x[:16], y[:16]), (x[16:], y[16:])]
    return fw.Task(train=split, calibration=split, validation=split, test=split, loss=nn.functional.cross_entropy,
                   score=fw.scores.top1, score_name="top1")


def light_task():
    whole = task()
    return fw.Task(validation=whole.validation, score=fw.scores.top1)


def number():
    return 7


def failing():
    raise KeyError("weights")
'''
RECIPE = '''
[model]
factory = "cli_models:net"
[task]
factory = "cli_models:task"
[compress]
out = "out"
seconds = 0.05
[[steps]]
kind = "prune.Channels"
macs = 0.5
[[steps]]
kind = "recover.Train"
epochs = 1
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "cli_models.py").write_text(MODULE)
    (tmp_path / "job.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cli_models", raising=False)
    return tmp_path


def run(*words, code=0):
    found = CliRunner().invoke(app, [str(w) for w in words])
    assert found.exit_code == code, (found.exit_code, found.stdout, found.stderr, found.exception)
    return found


@pytest.fixture
def saved(folder):
    sys.path.insert(0, str(folder))
    import cli_models

    fw.capture(*cli_models.pair()).save(folder / "net.fw")
    return folder / "net.fw"


def test_compress_writes_everything_and_says_it(folder):
    found = run("compress", "job.toml", "--json")
    document = json.loads(found.stdout)
    assert [m["step"] for m in document["trail"]] == ["original", "prune.Channels", "recover.Train"]
    assert document["flags"] == []
    assert document == json.loads((folder / "out" / "result.json").read_text())
    for name in ("model.onnx", "network.fw", "network.fwz", "report.html", "recipe.toml"):
        assert (folder / "out" / name).stat().st_size > 0
    html = (folder / "out" / "report.html").read_text()
    assert "prune.Channels" in html
    (folder / "out" / "report.html").unlink()
    assert run("report", "out").stdout.strip().endswith("report.html")
    assert (folder / "out" / "report.html").read_text() == html
    again = run("compress", "job.toml")  # everything stands: goes on from there
    assert "deployed file" in again.stdout
    assert "test split: top1" in again.stdout


def test_settings_change_the_recipe_and_a_flagged_run_exits_with_one(folder, monkeypatch):
    from featherweight.recipe import apply

    monkeypatch.setattr(apply, "flags_of", lambda index, *rest: [f"step {index} made it worse"])
    (folder / "short.toml").write_text(RECIPE.rpartition("[[steps]]")[0])
    found = run("compress", "short.toml", "--json", "--out", "there", "--set", "steps.1.macs=0.25",
                "--set", "compress.seed=3", "--set", "task.factory=cli_models:light_task", code=1)
    document = json.loads(found.stdout)
    assert document["flags"] == ["step 1 made it worse"]
    assert "flag: step 1 made it worse" in found.stderr
    tables = tomllib.loads((folder / "there" / "recipe.toml").read_text())
    assert tables["steps"][0]["macs"] == 0.25
    assert tables["compress"]["seed"] == 3
    assert document["trail"][1]["macs"] <= 0.3 * document["trail"][0]["macs"]


@pytest.mark.parametrize(("words", "message"), [
    (["compress", "none.toml"], "no such recipe"),
    (["compress", "job.toml", "--set", "steps.1.mac=0.5"], "did you mean 'macs'"),
    (["compress", "job.toml", "--set", "steps.7.macs=0.5"], "there is no step 7; the recipe has steps 1 to 2"),
    (["compress", "job.toml", "--set", "macs=0.5"], r"expected table.key=value"),
    (["compress", "job.toml", "--set", "compress.target=onnxruntim"], "did you mean 'onnxruntime'"),
    (["measure", "none.fw"], "no such file"),
    (["measure", "cli_models:nothing"], "has no function 'nothing'"),
    (["measure", "nowhere_at_all:nothing"], "there is no module 'nowhere_at_all'"),
    (["measure", "cli_models:number"], "gave a int"),
    (["measure", "cli_models:pair", "--task", "cli_models:number"], "gave a int; expected a featherweight.Task"),
    (["measure", "cli_models:pair", "--target", "onyx"], "no target named 'onyx'"),
    (["measure", "cli_models:net"], "no data to capture the model with"),
    (["inspect", "small.fwz"], "featherweight unpack small.fwz small.fw"),
    (["report", "."], "there is no result.json"),
    (["report", "out/nothing"], "name the folder that compress wrote"),
    (["measure", "model.onnx"], "model.onnx is a deployed file, which holds no network"),
    (["measure", "cli_models:failing", "--target", "onyx"], "no target named 'onyx'"),
    (["measure", "cli_models:failing"], "your function 'cli_models:failing' raised KeyError: 'weights'"),
    (["pack", "job.toml", "x.fwz"], "job.toml"),
])
def test_wrong_input_is_one_line_and_exit_code_two(folder, words, message):
    found = run(*words, code=2)
    assert found.stdout == ""
    assert found.stderr.startswith("error: ")
    assert "Traceback" not in found.stderr
    assert message in found.stderr


NOTHING = {"empty": b"", "zeros": bytes(4096), "noise": bytes(range(256)) * 8, "text": b"hello", "null": b"null",
           "list": b"[1, [2", "deep": b"[" * 100_000, "deep toml": b"a = " + b"[" * 100_000, "half": None}
READERS = [["measure", "{}.fw"], ["inspect", "{}.fw"], ["export", "{}.fw", "net.onnx"], ["pack", "{}.fw", "net.fwz"],
           ["unpack", "{}.fwz", "net.fw"], ["report", "{}.json"], ["compress", "{}.toml"],
           ["compress", "{}.toml", "--set", "steps.1.macs=0.5"], ["init", "--csv", "{}.csv", "--model", "x.fw"]]


@pytest.mark.parametrize("words", READERS, ids=lambda words: " ".join(words))
def test_every_command_answers_damaged_input_in_one_line(folder, saved, words):
    """Files of every sort that they are not, a file cut in half, a folder, and a file without rights."""
    (folder / "whole.fw").write_bytes(saved.read_bytes())
    for name, content in NOTHING.items():
        suffix = next(Path(w).suffix for w in words if "{}" in w)
        path = folder / f"{name}{suffix}"
        path.write_bytes(saved.read_bytes()[:saved.stat().st_size // 2] if content is None else content)
        found = CliRunner().invoke(app, [w.format(name) for w in words], input="\n" * 9)
        assert found.exit_code == 2, (name, found.exit_code, found.output)
        assert found.stderr.count("error: ") == 1, (name, found.stderr)
        assert "Traceback" not in found.stderr
    (folder / f"folder{suffix}").mkdir()
    assert CliRunner().invoke(app, [w.format("folder") for w in words], input="\n" * 9).exit_code == 2


def test_what_nobody_foresaw_is_told_with_its_traceback_and_no_failed_check(folder, saved, monkeypatch):
    from featherweight import codec

    monkeypatch.setattr(codec, "pack", lambda *given: 1 / 0)
    assert "ZeroDivisionError" in run("pack", saved, "net.fwz", code=3).stderr


def test_tables_are_whole_in_a_narrow_terminal():
    paths = [f"encoder.layers.{i}.self_attention.output_projection" for i in range(3)]
    first, last = (fw.measure.Measurement(s, n, n, n, (), n, n) for s, n in (("a", 4_000_000), ("b", 1_000_000)))
    rows = printed(show.layers([fw.measure.LayerFigures(
        p, "aten.conv2d.default", f"{p}.weight", (512, 512, 3, 3), 2359296, 2359296, 10**8, 4 * 2359296, "int8",
        (1, 512, 7, 7), p) for p in paths]))
    columns = [line[1:].partition(" ")[0] for line in rows]
    assert "".join(columns).endswith("".join(paths))
    assert any("512×512×3×3 int8" in line for line in rows)
    assert any("4.00\u00a0×\u00a0smaller" in line for line in printed(show.comparison(first, last, "title")))


def printed(table):
    """The lines of a table in 80 columns, with nothing cut off."""
    stream = io.StringIO()
    Console(file=stream, width=80).print(table)
    found = stream.getvalue().splitlines()
    assert all(len(line) <= 80 and "…" not in line for line in found)
    return found


def test_debug_shows_where(folder):
    found = CliRunner().invoke(app, ["--debug", "measure", "none.fw"])
    assert isinstance(found.exception, fw.errors.FileError)


def test_usage_errors_exit_with_two(folder):
    assert "No such command" in run("squeeze", code=2).stderr
    assert "Missing argument" in run("compress", code=2).stderr
    assert run("--version").stdout.strip() == fw.__version__
    assert "Exit codes" in run("--help").stdout


def test_measure_a_file_and_a_factory(folder, saved):
    by_file = json.loads(run("measure", saved, "--json").stdout)
    by_name = json.loads(run("measure", "cli_models:net", "--task", "cli_models:task", "--json").stdout)
    assert by_file["params"] == by_name["params"] == sum(p.numel() for p in fw.load(saved).parameters())
    assert by_file["macs"] == by_name["macs"]
    assert by_file["score"] is None
    assert (by_name["score_name"], by_name["split"]) == ("top1", "validation")
    assert by_name["agreement"]["ok"]
    text = run("measure", "cli_models:pair").stdout
    assert "deployed file (onnxruntime)" in text
    assert "within" in text


def test_a_job_file_names_its_model_and_its_task(folder, saved):
    """Wherever a model is named: nothing of a job file is to be typed again."""
    Path("mine.toml").write_text('[model]\nfactory = "cli_models:net"\n[task]\nfactory = "cli_models:task"\n'
                                 '[[steps]]\nkind = "quantize.Quantize"\n')
    by_job = json.loads(run("measure", "mine.toml", "--json").stdout)
    by_name = json.loads(run("measure", "cli_models:net", "--task", "cli_models:task", "--json").stdout)
    assert {k: by_job[k] for k in ("params", "macs", "score", "score_name")} == {
        k: by_name[k] for k in ("params", "macs", "score", "score_name")}
    another = json.loads(run("measure", "mine.toml", "--task", "cli_models:light_task", "--json").stdout)
    assert another["score_name"] != by_job["score_name"], "a task that is named comes first"
    assert json.loads(run("inspect", "mine.toml", "--json").stdout)["params"] == by_job["params"]
    assert json.loads(run("export", "mine.toml", "job.onnx", "--json").stdout)["ok"]
    assert "name a job file: featherweight advise job.toml" in run("advise", saved, code=2).stderr.replace("\n", " ")


def test_measure_and_export_say_when_the_file_differs(folder, saved, monkeypatch):
    from featherweight import deploy

    monkeypatch.setattr(deploy, "verify", lambda *a, **k: deploy.Agreement(1.0, 0.5, False, 1e-3))
    assert "more than the 0.001 allowed" in run("measure", saved, "--json", code=1).stderr
    assert "more than the 0.001 allowed" in run("export", saved, "net.onnx", "--json", code=1).stderr


def test_inspect_shows_groups_and_what_is_frozen(folder, saved):
    document = json.loads(run("inspect", saved, "--json").stdout)
    assert [g["name"] for g in document["groups"]] == ["0", "3"]
    assert document["groups"][0]["channels"] == 8
    assert {"tensor": "3.weight", "axis": 1} in document["groups"][0]["members"]
    assert any(f["path"] == "7" and "output" in f["reason"] for f in document["frozen"])
    assert sum(r["macs"] for r in document["layers"]) == document["macs"]
    text = run("inspect", "cli_models:pair").stdout
    assert "channels that live and die together" in text
    assert "frozen: 7" in text


def test_export_pack_and_unpack(folder, saved):
    document = json.loads(run("export", saved, "net.onnx", "--json").stdout)
    assert document["bytes"] == (folder / "net.onnx").stat().st_size
    assert document["ok"]
    packed = json.loads(run("pack", saved, "net.fwz", "--json").stdout)
    assert packed["to_bytes"] == (folder / "net.fwz").stat().st_size < packed["from_bytes"]
    assert "->" in run("unpack", "net.fwz", "back.fw").stdout
    assert (folder / "back.fw").read_bytes() == saved.read_bytes()


def test_report_refuses_what_is_no_result(folder):
    (folder / "result.json").write_text("[1")
    assert "is no JSON" in run("report", ".", code=2).stderr
    (folder / "result.json").write_text('{"format": 2}')
    assert "no result of format 1" in run("report", ".", code=2).stderr


LINES = """
import sys, time
from rich.console import Console
from featherweight.cli.progress import Listener
with Listener(Console(file=sys.stdout), beat=0.05) as listener:
    listener("step 1: prune.Channels", 0, 1, {})
    time.sleep(0.4)
    listener("measured prune.Channels", 1, 1, {"params": 12})
"""


def test_a_pipe_gets_a_line_now_and_then():
    source = str(Path(fw.__file__).parents[1])
    found = subprocess.run([sys.executable, "-c", LINES], check=True, capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": source}).stdout.splitlines()
    assert found[0] == "step 1: prune.Channels (2 of 5)"
    assert found[1].startswith("step 1: prune.Channels, 0 s so far")
    assert found[-1].split() == ["prune.Channels", "params", "12"]


# ---- the demo

def test_the_digits_are_split_without_overlap():
    pytest.importorskip("sklearn")
    parts = digits.digits()
    assert {name: len(labels) for name, (_, labels) in parts.items()} == digits.SIZES
    seen = [image.numpy().tobytes() for images, _ in parts.values() for image in images]
    assert len(seen) == 1797
    assert len(set(seen)) > 1790  # hardly any two digits are alike, so no image is in two splits


def test_the_demo_runs_and_can_be_repeated(folder):
    pytest.importorskip("sklearn")
    document = json.loads(run("demo", "--out", "out/demo", "--quick", "--json").stdout)
    steps = [m["step"] for m in document["trail"]]
    assert steps == ["original", "prune.Channels", "recover.Train", "quantize.Quantize"]
    first, last = document["trail"][0], document["trail"][-1]
    assert last["file_bytes"] < first["file_bytes"] / 4
    assert last["macs"] < 0.6 * first["macs"]
    assert last["score"] > 50  # ten classes
    assert document["final"]["after"]["split"] == "test"
    job = fw.Job.from_toml(folder / "out" / "demo" / "recipe.toml")
    assert job.recipe == demo_module.recipe(2)
    assert fw.load(job.model.file).signature.inputs[0].shape == (None, 1, None, None)


def test_the_demo_says_what_to_install(folder, monkeypatch):
    digits.digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    try:
        assert "pip install 'featherweight[demo]'" in run("demo", code=2).stderr
    finally:
        digits.digits.cache_clear()


def test_inspect_fits_80_columns(folder, saved, monkeypatch):
    monkeypatch.setattr(show.out, "width", 80)
    for more in ([], ["--ranks"]):
        text = run("inspect", saved, *more).stdout
        tables = [row for row in text.splitlines() if not row.startswith(("note:", "frozen:"))]
        assert max(map(len, tables)) <= 80
        assert "×3×3" in text
        assert "\\u" not in text


def test_a_network_says_what_it_is_in_ten_lines(saved):
    text = repr(fw.load(saved))
    assert len(text.splitlines()) <= 10
    assert max(map(len, text.splitlines())) <= 100
    for said in ("input    input: [any, 1, any, any] float32", "2 conv2d", "1 linear", "trainable"):
        assert said in text
