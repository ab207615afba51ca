"""``out/recipe.toml`` does the job again: another folder, the same bytes; it says every option and the versions."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import featherweight as fw
from featherweight.cli.app import app

JOB = """
[model]
factory = "reproduced:model"
[data]
npz = "arrays.npz"
batch = 16
[compress]
seconds = 0.01
out = "out"
seed = 3
[[steps]]
kind = "prune.Channels"
macs = 0.6
score = "random"
"""
MODEL = """
import torch
from torch import nn
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(128, 4)).eval()
"""


@pytest.mark.parametrize("elsewhere", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_recipe_gives_the_same_bytes(elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder of the job, and from another one."""
    job, here = tmp_path / "job", tmp_path / "here"
    job.mkdir()
    here.mkdir()
    rng = np.random.default_rng(0)
    np.savez(job / "arrays.npz", x=rng.integers(0, 255, (64, 8, 8), dtype=np.uint8), y=np.arange(64) % 4)
    (job / "job.toml").write_text(JOB)
    (job / "reproduced.py").write_text(MODEL)
    monkeypatch.chdir(here if elsewhere else job)
    monkeypatch.delitem(__import__("sys").modules, "reproduced", raising=False)
    first = CliRunner().invoke(app, ["compress", str(job / "job.toml")])
    assert first.exit_code in (0, 1), first.output
    out = Path("out").resolve()
    torch.manual_seed(99)  # what is drawn elsewhere changes nothing
    second = CliRunner().invoke(app, ["compress", str(out / "recipe.toml")])
    assert second.exit_code in (0, 1), second.output
    again = Path("out-again").resolve()
    for name in ("network.fw", "network.fwz", "model.onnx"):
        assert (out / name).read_bytes() == (again / name).read_bytes(), name


def test_it_says_every_option_and_the_versions(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    batches = [(torch.randn(8, 1, 8, 8), torch.arange(8) % 4)]
    network = fw.capture(model, batches[0][0][:2])
    assert isinstance(network, fw.Network)
    task = fw.Task.classification(batches, batches)
    fw.compress(network, task, [fw.quantize.Quantize()], out=tmp_path / "out", seconds=0.01)
    text = (tmp_path / "out" / "recipe.toml").read_text()
    assert text.startswith(f"# made by featherweight {fw.__version__}, python 3.")
    assert f"torch {torch.__version__}" in text.splitlines()[0]
    assert "onnxruntime" in text.splitlines()[0]
    (step,) = tomllib.loads(text)["steps"]
    assert set(step) == {"kind", *(f.name for f in dataclasses.fields(fw.quantize.Quantize))}
