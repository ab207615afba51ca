"""Files that version 0.1.0 wrote: networks, plans, recipes and jobs are read, and give what they gave then.

The files lie in ``fixtures/v0_1``; ``make.py`` beside them says how they came about.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import featherweight as fw
from featherweight.cli.app import app
from featherweight.errors import PlanError, RecipeError
from featherweight.steps import PLANS, Context, Plan
from featherweight.steps.plan import ALIASES

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:featherweight.* is now .*the old name goes:DeprecationWarning")
HERE = Path(__file__).parent / "fixtures" / "v0_1"
NETWORKS = sorted(p.stem for p in HERE.glob("*.fw"))
SAVED = sorted(p.stem for p in (HERE / "plans").glob("*.plan"))


def helper() -> ModuleType:
    """The module that holds what the fixtures were made from."""
    spec = importlib.util.spec_from_file_location("jobs_v0_1", HERE / "jobs_v0_1.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made = helper()


def outputs(network: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found = network(inputs)
    assert isinstance(found, Tensor)
    return found


def close(found: Tensor, wanted: Tensor, by: float = 1e-5) -> bool:
    """Whether they differ by no more than this part of the largest."""
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= by * wanted.abs().max())


# ---- networks

def test_there_are_fixtures_of_every_sort() -> None:
    assert {f"network_{n}" for n in ("plain", "quantized", "int4", "recurrent", "pruned", "small")} <= set(NETWORKS)
    assert len(SAVED) >= 12


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_loads_and_gives_what_it_gave(name: str) -> None:
    stored = load_file(HERE / f"{name}.safetensors")
    assert close(outputs(fw.load(HERE / f"{name}.fw"), stored["inputs"]), stored["outputs"])


def test_what_a_network_is_made_of_is_read_too(tmp_path: Path) -> None:
    pruned, quantized = fw.load(HERE / "network_pruned.fw"), fw.load(HERE / "network_quantized.fw")
    assert isinstance(pruned, fw.Network)
    assert isinstance(quantized, fw.Network)
    assert set(pruned.patterns.values()) == {"2:4"}
    assert all((pruned.tensor(name) == 0).float().mean() > 0.4 for name in pruned.patterns)
    assert sum(t.dtype == torch.int8 and t.dim() > 1 for t in quantized.tensors().values()) >= 4
    pruned.save(tmp_path / "again.fw")
    again = fw.load(tmp_path / "again.fw")
    assert isinstance(again, fw.Network)
    assert again.patterns == pruned.patterns


def test_an_archive_unpacks_to_the_very_same_bytes(tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["unpack", str(HERE / "network_quantized.fwz"), str(tmp_path / "network.fw")])
    assert said.exit_code == 0, said.output
    assert (tmp_path / "network.fw").read_bytes() == (HERE / "network_quantized.fw").read_bytes()


# ---- plans

@pytest.mark.parametrize("name", SAVED)
def test_a_plan_loads_and_does_what_it_did(name: str, tmp_path: Path) -> None:
    plain, inputs = fw.load(HERE / "network_plain.fw"), load_file(HERE / "network_plain.safetensors")["inputs"]
    assert isinstance(plain, fw.Network)
    plan = Plan.load(HERE / "plans" / f"{name}.plan")
    wanted = load_file(HERE / "plans" / "outputs.safetensors")[name]
    assert close(outputs(plan.apply(plain), inputs), wanted)
    assert not close(wanted, outputs(plain, inputs)), "it changed something"
    plan.save(tmp_path / "again.plan")
    again = Plan.load(tmp_path / "again.plan")
    assert again == plan
    assert close(outputs(again.apply(plain), inputs), wanted)


def test_there_is_a_plan_of_every_shipped_kind() -> None:
    assert {type(Plan.load(HERE / "plans" / f"{name}.plan")) for name in SAVED} == {
        PLANS[kind] for kind in ALIASES.values()}


def test_a_plan_for_another_network_is_refused_in_words() -> None:
    small = made.network()
    with pytest.raises(PlanError, match="which this network does not have"):
        Plan.load(HERE / "plans" / "prune_channels.plan").apply(small)


# ---- recipes

def test_a_recipe_of_every_step_is_read() -> None:
    recipe = fw.Recipe.from_toml(HERE / "recipe.toml")
    assert recipe == made.RECIPE
    assert fw.Recipe.from_toml(made.RECIPE.to_toml()) == recipe


def test_a_job_file_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    job = fw.Job.from_toml(HERE / "job.toml")
    assert (job.recipe, job.options.seed, job.options.target) == (made.DONE, 5, "onnxruntime")
    assert job.task.arguments == {"count": 2}
    network, task = job.prepare()
    assert outputs(network, next(task.batches("calibration"))[0]).shape == (8, made.CLASSES)
    again = fw.Job.from_toml(job.to_toml())
    assert (again.model, again.task, again.options, again.recipe) == (job.model, job.task, job.options, job.recipe)


# ---- jobs

@pytest.fixture(params=["job_done", "job_half"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return copy_of(request.param, tmp_path)


def copy_of(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(HERE / name, folder / name))


def stamps(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_report_is_drawn_from_a_result(tmp_path: Path) -> None:
    out = copy_of("job_done", tmp_path)
    said = CliRunner().invoke(app, ["report", str(out)])
    assert said.exit_code == 0, said.output
    page = (out / "report.html").read_text(encoding="utf-8")
    for plan in json.loads((out / "result.json").read_text())["plans"]:
        assert plan["kind"] in page
    assert "<svg" in page


def test_what_a_job_left_is_read() -> None:
    stored = load_file(HERE / "jobs.safetensors")
    assert close(outputs(fw.load(HERE / "job_done" / "network.fw"), stored["inputs"]), stored["job_done"])
    assert fw.Recipe.from_toml(HERE / "job_done" / "recipe.toml") == made.DONE
    during = Plan.load(HERE / "job_done" / "state" / "step_2" / "during_0.plan")
    assert "zero" in during.summary()


VERSION = r"holds the state of a job that version 0\.1 of featherweight wrote.*out=another folder.*resume=False"


def test_a_job_that_was_done_is_refused_in_truthful_words_and_its_result_is_read(tmp_path: Path) -> None:
    out = copy_of("job_done", tmp_path)
    before = stamps(out)
    with pytest.raises(RecipeError, match=VERSION):
        fw.compress(made.network(), made.small_task(), made.DONE, out=out, **made.OPTIONS)
    assert stamps(out) == before, "nothing was touched"
    said = CliRunner().invoke(app, ["report", str(out)])
    assert said.exit_code == 0, said.output
    page = unescape((out / "report.html").read_text(encoding="utf-8"))
    assert all(plan["summary"] in page for plan in json.loads((out / "result.json").read_text())["plans"])


def test_a_job_that_was_killed_is_refused_in_truthful_words(tmp_path: Path) -> None:
    out = copy_of("job_half", tmp_path)
    before = stamps(out)
    with pytest.raises(RecipeError, match=VERSION):
        fw.compress(made.network(), made.small_task(), made.HALF, out=out, **made.OPTIONS)
    assert stamps(out) == before, "nothing was touched"


def test_another_job_in_its_folder_is_refused_with_what_to_do(either: Path) -> None:
    other = fw.Recipe([fw.prune.Channels(ratio=0.5)])
    with pytest.raises(RecipeError, match=VERSION):
        fw.compress(made.network(), made.small_task(), other, out=either, **made.OPTIONS)


def test_a_job_that_was_killed_starts_over_where_that_is_asked_for(tmp_path: Path) -> None:
    out, other = copy_of("job_half", tmp_path), fw.Recipe([fw.prune.Weights(sparsity=0.5)])
    result = fw.compress(made.network(), made.small_task(), other, out=out, resume=False, **made.OPTIONS)
    assert [m.step for m in result.trail] == ["original", "prune.Weights"]


def test_a_checkpoint_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = copy_of("job_half", tmp_path) / "state" / "step_2"
    for step in (made.HALF.steps[1], replace(made.HALF.steps[1], lr=0.5)):
        with pytest.raises(RecipeError, match=r"checkpoint .* written by version 0\.1 .*delete it to start over"):
            step.fit(made.network(), made.small_task(), Context(original=made.network(), workdir=folder))
