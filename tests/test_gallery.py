"""The examples: listed, copied, short, and running; quickly with little data and no measuring, slowly as they are."""

from __future__ import annotations

import ast
import importlib
import itertools
import os
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import featherweight as fw
from featherweight.cli import gallery
from featherweight.cli.app import app
from featherweight.recipe import job as jobs
from featherweight.steps import Context, Rewrite

ROOT = Path(__file__).parents[1]
#: example -> what makes it small: names in its module
SMALL: dict[str, dict[str, Any]] = {
    "image_classifier": {"COUNT": 120, "EPOCHS": 1, "WIDTH": 8}, "text_classifier": {"COUNT": 24, "EPOCHS": 1},
    "keyword_spotting": {"EPOCHS": 1, "BATCHES": 2, "BATCH": 8}, "time_series": {"COUNT": 200, "EPOCHS": 1},
    "tabular": {"EPOCHS": 1}, "segmentation": {"EPOCHS": 1, "BATCHES": 2, "BATCH": 4, "WIDTH": 2},
    "super_resolution": {"EPOCHS": 1, "PATCHES": 60}, "detector": {"EPOCHS": 2, "WIDTH": 2, "WIDE": 64, "HIGH": 64},
    "torchvision_classifier": {"COUNT": 10, "EPOCHS": 1}}
QUICK = ("keyword_spotting", "tabular", "super_resolution", "detector")
NEEDS = {"image_classifier": "sklearn", "tabular": "sklearn", "super_resolution": "sklearn",
         "text_classifier": "transformers", "detector": "PIL", "torchvision_classifier": "torchvision"}
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("gallery")]


def lines(file: Path) -> int:
    """Lines of code, but for imports, comments, blanks and docstrings; of a job file, but for comments and blanks."""
    text = file.read_text()
    if file.suffix == ".toml":
        return sum(bool(row.strip()) and not row.startswith("#") for row in text.splitlines())
    statements = [n for n in ast.parse(text).body if not isinstance(n, ast.Import | ast.ImportFrom) and not (
        isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    return sum((n.end_lineno or 0) - n.lineno + 1 for n in statements)


@pytest.mark.parametrize("name", SMALL)
def test_it_takes_fifteen_lines(name: str) -> None:
    folder = ROOT / "examples" / name
    own = folder / "compress.py"
    if own.exists():
        assert lines(own) <= 15
    else:
        assert lines(folder / "job.toml") <= 25
    assert gallery.command_of(folder) == ("python compress.py" if own.exists() else "featherweight compress job.toml")


def done(network: fw.Network, task: fw.Task, recipe: Any, **options: Any) -> Any:
    """In the place of ``compress``: every step decided and done, nothing measured in a runtime."""
    found, whole = network, network
    for step in fw.Recipe(recipe).steps if not isinstance(recipe, fw.Recipe) else recipe.steps:
        if isinstance(step, Rewrite):
            found = step.plan(found, task).apply(found)
        else:
            found = step.fit(found, task, Context(original=whole))
    scored = [type("Row", (), {"score": task.score(n, task.batches("validation"))})() for n in (whole, found)]  # type: ignore[misc]
    return type("Result", (), {"trail": scored, "network": found, "flags": (), "final": None})()


def judged(network: fw.Network, task: fw.Task, split: str, **options: Any) -> Any:
    """In the place of ``measure``: the score of the network itself."""
    assert task.score is not None
    return type("Row", (), {"score": task.score(network, task.batches(split)), "archive_bytes": 0})()


@pytest.fixture
def copied(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
           ) -> Iterator[tuple[str, Path]]:
    """An example as the command copies it, the current folder and on the path; its modules are forgotten afterwards."""
    name = request.param
    pytest.importorskip(NEEDS.get(name, "torch"))
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["examples", name]).exit_code == 0
    monkeypatch.chdir(tmp_path / name)
    monkeypatch.syspath_prepend(str(tmp_path / name))
    for own in (tmp_path / name).glob("*.py"):
        monkeypatch.delitem(sys.modules, own.stem, raising=False)
    torch.manual_seed(0)
    yield name, tmp_path / name
    for own in (tmp_path / name).glob("*.py"):
        sys.modules.pop(own.stem, None)


@pytest.mark.parametrize("copied", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
                                    for name in SMALL], indirect=True)
def test_it_runs_with_little_data(copied: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    name, folder = copied
    module = importlib.import_module("model" if (folder / "model.py").exists() else next(folder.glob("*.py")).stem)
    for key, value in SMALL[name].items():
        assert hasattr(module, key)
        monkeypatch.setattr(module, key, value)
    if name == "detector":
        monkeypatch.setattr(module.voc, "COUNT", {"train": 8, "val": 4, "test": 4})
        monkeypatch.delenv("VOC", raising=False)
    monkeypatch.setattr(fw, "compress", done)
    monkeypatch.setattr(fw.measure, "measure", judged)
    scores: list[float] = []
    if (folder / "compress.py").exists():
        held = runpy.run_path("compress.py")
        scores = [row.score for row in held["result"].trail] if "result" in held else [held["before"].score,
                                                                                      held["after"].score]
    else:
        monkeypatch.setattr(jobs, "compress", done)
        job = fw.Job.from_toml(Path("job.toml"))
        network, task = job.prepare()
        few = [fw.recover.Train(epochs=1, lr=0.01) if isinstance(s, fw.recover.Train) else s for s in job.recipe.steps]
        scores = [row.score for row in done(network, task, few).trail]
    assert all(torch.isfinite(torch.tensor(score)) for score in scores)


@pytest.mark.parametrize("copied", ["detector"], indirect=True)
def test_the_detector_reads_back_what_it_is_trained_for(copied: tuple[str, Path]) -> None:
    """Maps that say at every place what its box is give the boxes of a drawn set in VOC's form again, each once."""
    voc, model = importlib.import_module("voc"), importlib.import_module("model")
    voc.COUNT = {"train": 4, "val": 1, "test": 1}
    images, targets = voc.read(voc.folder(), "train", 256, 192)
    assert images.shape == (4, 3, 192, 256)
    for image, target in zip(images, targets, strict=True):
        grid = torch.zeros(1, 4, 24, 32)
        labels, away = model.assigned(target, grid)
        for y, x in itertools.product(range(24), range(32)):          # in the words of the rule
            px, py, own = x * 8 + 4, y * 8 + 4, []
            for (a, b, c, d), kind in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
                if a < px < c and b < py < d and max(abs((a + c) / 2 - px), abs((b + d) / 2 - py)) < 12:
                    own.append(((c - a) * (d - b), kind, [(px - a) / 8, (py - b) / 8, (c - px) / 8, (d - py) / 8]))
            if own:
                _, kind, sides = min(own)
                assert (int(labels[y, x]), away[:, y, x].tolist()) == (kind, pytest.approx(sides))
            else:
                assert labels[y, x] == -1
        classes = 12 * torch.eye(4)[torch.where(labels < 0, 3, labels)].permute(2, 0, 1)[None]
        maps = {"classes": classes, "sides": away.clamp(min=1e-3).log()[None]}
        assert float(model.loss(maps, [target])) < 1e-3
        found = model.boxes(maps)
        assert len(found[0]["boxes"]) <= len(target["boxes"]), "each once; not those that others cover"
        assert fw.scores.mean_ap(lambda x, f=found: f, [(image[None], [target])], ious=(0.5,)) > 60


@pytest.mark.slow
@pytest.mark.parametrize("copied", SMALL, indirect=True)
def test_it_runs_as_it_is(copied: tuple[str, Path]) -> None:
    """The one command of its README, in a process of its own."""
    words = gallery.command_of(copied[1]).split()
    command = [sys.executable, *words[1:]] if words[0] == "python" else [
        sys.executable, "-c", "from featherweight.cli import main; main()", *words[1:]]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert found.returncode in (0, 1), found.stderr[-2000:]
    if copied[0] != "keyword_spotting":
        assert Path("out/report.html").is_file()


def test_they_are_listed_and_wrong_names_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed = CliRunner().invoke(app, ["examples"])
    assert listed.exit_code == 0
    assert set(SMALL) <= {row.split()[0] for row in listed.stdout.splitlines() if row}
    wrong = CliRunner().invoke(app, ["examples", "tabulr"])
    assert wrong.exit_code == 2
    assert "tabular" in wrong.output
    (tmp_path / "tabular").mkdir()
    assert "is there already" in CliRunner().invoke(app, ["examples", "tabular"]).output
    assert CliRunner().invoke(app, ["examples", "tabular", "--out", "other"]).exit_code == 0
    assert (tmp_path / "other" / "job.toml").is_file()


def test_the_wheel_carries_every_example() -> None:
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    assert {Path(place).name for place in files} == {p.name for p in (ROOT / "examples").iterdir() if p.is_dir()}
    for name, (pattern,) in files.items():
        assert pattern == f"examples/{Path(name).name}/*.*"
        assert (ROOT / "examples" / Path(name).name / "README.md").is_file()
