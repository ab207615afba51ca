"""The JSON schema of job files: what the reader takes, the schema takes; what it refuses by name or type, too."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import featherweight as fw
from featherweight.cli.app import app
from featherweight.cli.schema import job_schema, options_told
from featherweight.errors import RecipeError
from featherweight.recipe.kinds import kinds
from test_docs import PAGES, of

ROOT = Path(__file__).parents[1]
SCHEMA = job_schema()  # without what other tests registered, or will
WORDS = {"$schema", "title", "type", "description", "default", "properties", "required", "const", "enum", "items",
         "additionalProperties", "anyOf", "oneOf", "allOf", "if", "then", "$ref", "definitions"}
STEP = "[model]\nfile = 'a.fw'\n[task]\nfactory = 'a:b'\n[[steps]]\n"
TYPES: dict[str, Any] = {"string": str, "boolean": bool, "array": list, "object": dict, "number": (int, float),
                         "integer": int}


def faults(value: Any, part: dict[str, Any], path: str = "") -> list[str]:
    """What draft 7 says against a value, for the words that our schema uses."""
    assert not set(part) - WORDS
    found: list[str] = []
    if "$ref" in part:
        return faults(value, SCHEMA["definitions"][part["$ref"].removeprefix("#/definitions/")], path)
    if "type" in part and (not isinstance(value, TYPES[part["type"]]) or (
            isinstance(value, bool) and part["type"] != "boolean")):
        return [f"{path}: {value!r} is no {part['type']}"]
    if ("const" in part and value != part["const"]) or ("enum" in part and value not in part["enum"]):
        found.append(f"{path}: {value!r}")
    if isinstance(value, dict):
        known, more = part.get("properties", {}), part.get("additionalProperties", {})
        found += [f"{path}: lacks {n}" for n in part.get("required", []) if n not in value]
        for key, item in value.items():
            if key in known or isinstance(more, dict):
                found += faults(item, known.get(key, more), f"{path}.{key}")
            elif not more:
                found.append(f"{path}: unknown {key}")
    for i, item in enumerate(value if isinstance(value, list) else ()):
        found += faults(item, part.get("items", {}), f"{path}[{i}]")
    for word, wanted in (("anyOf", lambda n: n >= 1), ("oneOf", lambda n: n == 1)):
        if word in part and not wanted(sum(not faults(value, p, path) for p in part[word])):
            found.append(f"{path}: {value!r} fits {word} wrongly")
    for one in part.get("allOf", []):
        if not faults(value, one["if"], path):
            found += faults(value, one["then"], path)
    return found


JOBS = {str(p.relative_to(ROOT)): p.read_text() for p in sorted(ROOT.glob("examples/*/*.toml"))}
JOBS |= {f"{name}:{block.line}": block.text for name, page in PAGES.items() for block in of(page, "toml")
         if "[model]" in block.text}


@pytest.mark.parametrize("name", JOBS)
def test_every_job_file_fits(name: str) -> None:
    assert faults(tomllib.loads(JOBS[name]), SCHEMA) == []


@pytest.mark.parametrize("words", [
    ["--model", "torchvision:resnet18", "--images", "photos"], ["--model", "timm:x", "--npz", "a.npz"],
    ["--model", "schema_model:make", "--csv", "rows.csv", "--label", "y"],
    ["--model", "transformers:x", "--csv", "rows.csv", "--label", "y", "--text", "t", "--tokenizer", "x"]])
def test_what_init_writes_fits_with_every_comment_taken_up(words: list[str], tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    for k in range(9):
        Image.new("L", (8, 8)).save(tmp_path / "photos" / "cat" / f"{k}.png")
    (tmp_path / "rows.csv").write_text("t,a,y\n" + "a,1,b\n" * 9)
    (tmp_path / "schema_model.py").write_text("def make(): ...\n")
    np.savez(tmp_path / "a.npz", x=np.zeros((9, 2)), y=np.arange(9))
    assert CliRunner().invoke(app, ["init", *words]).exit_code == 0
    text = (tmp_path / "job.toml").read_text()
    assert faults(tomllib.loads(text), SCHEMA) == []
    taken = re.sub(r"^# (?=\[\[|\w+ = )", "", text, flags=re.MULTILINE)
    assert taken != text
    assert faults(tomllib.loads(taken), SCHEMA) == []
    assert len(tomllib.loads(taken)["steps"]) == 3


def test_every_kind_written_out_fits() -> None:
    """Every step at its defaults, with every option written."""
    for name, cls in fw.recipe.kinds().items():
        if name not in SCHEMA["definitions"]:
            continue
        try:
            step = cls()
        except TypeError:
            continue
        try:
            written = tomllib.loads(fw.recipe.toml.write(fw.recipe.toml.describe(step, complete=True)))
        except RecipeError:
            continue
        assert faults(written, SCHEMA["definitions"][name]) == [], name


@pytest.mark.parametrize(("text", "said"), [
    (STEP + "kind = 'prune.Channel'\n", "prune.Channel"),
    (STEP + "kind = 'prune.Channels'\nmac = 0.5\n", "unknown mac"),
    (STEP + "kind = 'prune.Channels'\nmacs = 'half'\n", "anyOf"),
    (STEP + "kind = 'recover.Train'\noptimizer = 'adam'\n", "adam"),
    ("[model]\nfile = 'a.fw'\n[[steps]]\nkind = 'prune.Channels'\n", "oneOf"),
    ("[model]\nfile = 'a.fw'\n[data]\nimages = 'x'\nsizes = 3\n", "oneOf"),
    ("[modle]\nfile = 'a.fw'\n", "unknown modle")])
def test_what_the_reader_refuses_the_schema_refuses(text: str, said: str) -> None:
    found = faults(tomllib.loads(text), SCHEMA)
    assert any(said in fault for fault in found), found
    with pytest.raises(RecipeError):
        fw.Job.from_toml(text)


def test_options_are_described_in_the_words_of_the_docstring() -> None:
    channels = SCHEMA["definitions"]["prune.Channels"]["properties"]
    assert channels["macs"]["description"] == "multiply-accumulates."
    assert '"fpgm" (distance to the other filters)' in channels["score"]["description"]
    assert channels["score"]["default"] == "l1"
    assert options_told("A.\n\n    x, y: both. z: one\n        more.\n") == {
        "x": "both.", "y": "both.", "z": "one more."}
    options = [one for kind, held in SCHEMA["definitions"].items()
               if "." in kind and kinds()[kind].__module__.startswith("featherweight.")  # other tests register theirs
               for option, one in held["properties"].items() if option != "kind"]
    assert sum("description" in one for one in options) > 0.8 * len(options)


def test_the_command_prints_it() -> None:
    found = CliRunner().invoke(app, ["schema"])
    assert found.exit_code == 0
    assert json.loads(found.stdout) == json.loads(json.dumps(job_schema()))
