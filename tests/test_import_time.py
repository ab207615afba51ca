"""What importing loads, in fresh processes. Seconds are measured by ``benchmarks/import_time.py``, asserted nowhere."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import featherweight as fw

#: packages that are imported where they are used: by an export, a training, a page, a command
USED_LATER = {"accelerate", "jinja2", "nncf", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "openvino", "rich",
              "scipy", "sklearn", "sympy", "tensorly", "torch._dynamo", "torch._inductor", "torch.onnx", "typer"}


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


def test_a_saved_plan_is_read_before_its_family_was_asked_for() -> None:
    path = Path(__file__).parent / "fixtures/v0_1/plans"
    for file in sorted(path.glob("*.plan")):
        kind = printed(f"from featherweight.steps import Plan; print(Plan.load({str(file)!r}).kind)")
        assert kind.partition(".")[0] in ("prune", "quantize", "factorize", "share")
        break
