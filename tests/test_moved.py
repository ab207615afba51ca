"""Names that moved: every old one warns, gives the new thing, and is gone with the version it was told to go with."""

from __future__ import annotations

import importlib
import pkgutil
import re
import warnings

import pytest
import torch
from packaging.version import Version

import featherweight as fw
from featherweight.steps.moved import MOVED, moved


@pytest.fixture(scope="module", autouse=True)
def _everything_imported() -> None:
    for found in pkgutil.walk_packages(fw.__path__, "featherweight."):
        importlib.import_module(found.name)


def test_every_old_name_warns_and_gives_the_new_thing() -> None:
    assert {"featherweight.quantize.Ladder", "featherweight.quantize.Mixed"} <= set(MOVED)
    for old, there in MOVED.items():
        folder, _, name = there.place.rpartition(".")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            new = getattr(importlib.import_module(folder), name)
        module, _, name = old.rpartition(".")
        told = f"{old} is now {there.line}; the old name goes with version {there.goes}"
        with pytest.warns(DeprecationWarning, match=f"^{re.escape(told)}$"):
            assert getattr(importlib.import_module(module), name) is new


def test_functions_that_are_called_otherwise_now_warn() -> None:
    network = fw.capture(torch.nn.Linear(2, 2), torch.zeros(2, 2))
    task = fw.Task(calibration=lambda: [(torch.zeros(2, 2), None)])
    with pytest.warns(DeprecationWarning, match=r"is now fw\.sensitivity\(.*\); the old name goes with version 0\.4"):
        assert fw.quantize.sensitivity(network, task, kinds=()) == ()
    with pytest.warns(DeprecationWarning, match=r"is now fw\.sensitivity\(.*\); the old name goes with version 0\.4"):
        assert fw.prune.sensitivity(network, task, fw.prune.axis_groups(network), (), ()) == ()


def test_no_old_name_outlives_its_version() -> None:
    now = Version(fw.__version__).release[:2]
    late = {old: there.goes for old, there in MOVED.items() if Version(there.goes).release <= now}
    assert not late, "take these names out, and say so in CHANGELOG.md"


def test_names_go_two_minor_versions_after_they_moved() -> None:
    getattr_ = moved("mine", {"Old": "featherweight.recover.Train"}, since="1.9")
    try:
        assert MOVED["mine.Old"].goes == "1.11"
        with pytest.warns(DeprecationWarning, match=re.escape("mine.Old is now featherweight.recover.Train")):
            assert getattr_("Old") is fw.recover.Train
        with pytest.raises(AttributeError, match="module 'mine' has no attribute 'Odd'"):
            getattr_("Odd")
    finally:
        del MOVED["mine.Old"]
