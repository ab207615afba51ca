"""Every public name has an example in its docstring, and the examples run.

An example is a few ``>>>`` lines under ``Example:``, at the end of the docstring of a class, a function or a method. It
is run as doctest does, in a folder of its own, and finds there what ``namespace`` gives.
"""

from __future__ import annotations

import doctest
import inspect
import re
import tempfile
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight.steps.kinds import REGISTERED
from public_api import names

pytestmark = pytest.mark.xdist_group("examples")  # what costs more is made once
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
#: public names without an example, still; the list only shrinks
WITHOUT = {  # what goes with version 0.4
    "featherweight.prune.sensitivity", "featherweight.quantize.Damage", "featherweight.quantize.sensitivity",
}

NAMES = dict(names())


@cache
def given() -> dict[str, Any]:
    """What examples find: ``fw``, ``torch``, ``nn``, a ``model`` with ``images``, its ``network`` and a ``task``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
                          nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 4)).eval()
    images, classes = torch.randn(32, 1, 8, 8), torch.arange(32) % 4
    split = [(images[i:i + 8], classes[i:i + 8]) for i in range(0, 32, 8)]
    task = fw.Task(train=lambda: split, calibration=lambda: split[:2], validation=lambda: split, test=lambda: split,
                   loss=nn.functional.cross_entropy, score=fw.scores.top1, score_name="top-1 %")
    return {"fw": fw, "torch": torch, "nn": nn, "model": model, "images": images, "task": task,
            "network": fw.capture(model, images[:2])}


@cache
def result() -> fw.Result:
    """Examples of what a job gives find its ``result``."""
    steps = [fw.prune.Channels(macs=0.5), fw.quantize.Quantize()]
    return fw.compress(given()["network"], given()["task"], steps, seconds=0.01)


@cache
def runner() -> fw.deploy.Runner:
    """Examples of a deployed file find it loaded."""
    network, runtime = given()["network"], fw.deploy.target("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        runtime.export(network, Path(folder, "model.onnx"))
        return runtime.load(Path(folder, "model.onnx"), like=network.signature)


def namespace(test: doctest.DocTest) -> dict[str, Any]:
    """``given``, and of what costs more whatever the example reads."""
    costly = {name: make() for name, make in (("result", result), ("runner", runner))
              if any(re.search(rf"\b{name}\b(?! =)", example.source) for example in test.examples)}
    return {**given(), "network": given()["network"].copy(), **costly}


def examples(name: str, value: Any) -> list[doctest.DocTest]:
    """The examples of a public name: its own, and a class's methods'."""
    parts = {name: value}
    if inspect.isclass(value):
        kinds = (FunctionType, classmethod, staticmethod, property)
        parts |= {f"{name}.{n}": m for n, m in vars(value).items() if isinstance(m, kinds)}
    found = [doctest.DocTestParser().get_doctest(inspect.cleandoc(part.__doc__ or ""), {}, title, None, 0)
             for title, part in parts.items()]
    return [test for test in found if test.examples]


#: their examples do what another one does that runs as well
LIKE_OTHERS = ("featherweight.errors.Untimed", "featherweight.Advice", "featherweight.balance.Trial")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LIKE_OTHERS))
                                  for n in sorted(n for n, v in NAMES.items() if examples(n, v))])
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for test in examples(name, NAMES[name]):
        said: list[str] = []
        test.globs.update(namespace(test))
        with patch.dict(REGISTERED):
            found = doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test, out=said.append)
        assert found.attempted
        assert not found.failed, "".join(said)


def test_every_public_name_has_an_example() -> None:
    bare = {name for name, value in NAMES.items() if not examples(name, value)}
    assert bare - WITHOUT == set(), "write an example at the end of the docstring (CONTRIBUTING.md, 'Public names')"
    assert WITHOUT - bare == set(), "these have one now: take them from the list"
