"""What importing loads, in fresh processes. Seconds are measured by ``benchmarks/import_time.py``, asserted nowhere."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import featherweight as fw

#: packages that are imported where they are used: by an export, a training, a page, a command
USED_LATER = {"accelerate", "jinja2", "nncf", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "openvino", "optuna",
              "ray", "rich", "scipy", "sklearn", "sympy", "tensorly", "torch._dynamo", "torch._inductor", "torch.onnx",
              "typer"}


def printed(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error::DeprecationWarning:featherweight", "-c", code],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def loaded(code: str) -> set[str]:
    """The names in ``sys.modules`` of a fresh process that ran ``code``."""
    return set(printed(f"{code}\nimport sys; print(*sys.modules)").split())


def test_importing_loads_no_package_that_is_used_later() -> None:
    found = loaded("import featherweight")
    assert "featherweight" in found
    assert found & (USED_LATER | {"torch", "numpy", "pydantic"}) == set()


def test_every_public_name_needs_torch_and_little_else() -> None:
    found = loaded("import featherweight as fw\nfor name in fw.__all__: getattr(fw, name)")
    assert {"torch", "featherweight.recipe.apply", "featherweight.quantize.step"} <= found
    assert found & USED_LATER == set()


@pytest.mark.parametrize("code", ["import sys; sys.argv = ['featherweight', '--version']; "
                                  "from featherweight.cli import main; main()"])
def test_the_version_is_said_without_torch(code: str) -> None:
    assert printed(code) == fw.__version__
    assert "torch" not in loaded(code)


def test_the_version_stands_in_one_place() -> None:
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert "version" in settings["project"]["dynamic"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "featherweight.__version__"}


def test_public_names_are_found_listed_and_kept() -> None:
    for name in fw.__all__:
        assert getattr(fw, name) is getattr(fw, name)
    assert set(fw.__all__) <= set(dir(fw))
    assert fw.steps.Plan is not None, "folders that are no family are found as well"
    with pytest.raises(AttributeError, match="module 'featherweight' has no attribute 'sensitvity'"):
        _ = fw.sensitvity


#: in a fresh process, what is looked up by name before its family was asked for -> what is printed
LOOKED_UP = {
    "from featherweight.steps import Plan\nprint(Plan.load({plan!r}).kind)": "factorize.low_rank/1",
    "from featherweight.judge.candidates import family_of\nprint(family_of('prune.channels').name)": "prune.channels",
    "from featherweight.recipe import kinds\nprint(kinds()['share.Codebook'].__name__)": "Codebook",
    "from featherweight.deploy import TARGETS\nprint(*sorted(TARGETS))": "onnxruntime openvino openvino-bf16",
    "from featherweight.axes.literals import MENDS\nfrom featherweight.axes.zero import MIXES\n"
    "import torch; aten = torch.ops.aten\n"
    "print(aten.zeros.default in MENDS, aten.addmm.default in MIXES)": "True True",
}


@pytest.mark.parametrize("code", [pytest.param(code, marks=[pytest.mark.slow] * (i % 2)) for i, code in
                                  enumerate(LOOKED_UP)])
def test_tables_are_full_whatever_was_asked_for_before(code: str) -> None:
    plan = Path(__file__).parent / "fixtures/v0_1/plans/factorize_low_rank.plan"
    assert printed(code.format(plan=str(plan))) == LOOKED_UP[code]


def test_another_package_cannot_take_the_kind_of_a_shipped_plan_first() -> None:
    code = """
from typing import ClassVar
from featherweight.errors import PlanError
from featherweight.steps import Plan
try:
    class Mine(Plan):
        kind: ClassVar[str] = "prune.channels/1"
        def apply(self, network): return network
        def summary(self): return ""
except PlanError as error:
    print(error)
"""
    assert "is taken by featherweight.prune.channels.plan.ChannelPlan" in printed(code)
