"""The seam: kinds and fields of saved plans, options that are checked when a recipe is made, fingerprints of states."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import featherweight as fw
from featherweight.errors import ExportError, FileError, PlanError, RecipeError
from featherweight.recipe import Job, kinds
from featherweight.recipe.files import JOB_FORMAT, State
from featherweight.recover import checkpoint
from featherweight.recover.checkpoint import Checkpoint, Position
from featherweight.steps import PLANS, Context, Fit, Plan, Rewrite, Stage
from featherweight.steps.fingerprint import canonical, fingerprint
from featherweight.steps.kinds import kind_of
from featherweight.steps.options import Numbers
from featherweight.steps.plan import ALIASES

BatchNorm, Train, Logits = fw.recover.BatchNorm, fw.recover.Train, fw.distill.Logits
Channels, Layers, Weights = fw.prune.Channels, fw.prune.Layers, fw.prune.Weights
Quantize, Ladder, Mixed = fw.quantize.Quantize, fw.balance.Ladder, fw.balance.Mixed
LowRank, Codebook = fw.factorize.LowRank, fw.share.Codebook
NAN, INF = math.nan, math.inf
SAVED = sorted((Path(__file__).parent / "fixtures" / "v0_1" / "plans").glob("*.plan"))


# ---- kinds of plans

@pytest.fixture
def plans() -> Iterator[dict[str, type[Plan]]]:
    """The table of plans, left as it was found."""
    before = dict(PLANS)
    yield PLANS
    PLANS.clear()
    PLANS.update(before)


def defined(name: str, module: str, **members: Any) -> type[Plan]:
    """A new plan class, as a module of this name would define it."""
    return type(name, (Plan,), {"__module__": module, "apply": lambda self, network: network,
                                "summary": lambda self: "nothing", **members})


#: kinds that version 0.1 did not have
SINCE_0_1 = {"balance.mixed/1": "MixedPlan", "distill.student/1": "StudentPlan", "factorize.merge/1": "MergePlan",
             "factorize.structured/1": "StructuredPlan", "factorize.compact/1": "CompactPlan",
             "share.transferred/1": "TransferredPlan", "share.hashed/1": "HashedPlan",
             "share.block_codebook/1": "BlockCodebookPlan", "share.vectors/1": "VectorsPlan"}


def test_shipped_plans_have_the_kinds_that_files_name() -> None:
    shipped = {kind: cls.__name__ for kind, cls in PLANS.items() if cls.__module__.startswith("featherweight.")}
    assert shipped == {
        "prune.channels/1": "ChannelPlan", "prune.weights/1": "WeightPlan", "prune.layers/1": "LayerPlan",
        "quantize/1": "QuantizePlan", "factorize.low_rank/1": "LowRankPlan", "share.codebook/1": "CodebookPlan",
        **SINCE_0_1}
    older = {name: kind for kind, name in shipped.items() if kind not in SINCE_0_1}
    assert {old.partition(".")[2]: kind for old, kind in ALIASES.items()} == older


def test_another_package_does_not_take_a_shipped_plans_place(plans: dict[str, type[Plan]]) -> None:
    shipped, text = fw.prune.ChannelPlan({}, {}, 4, 4).to_json(), '"kind": "prune.channels/1"'
    assert text in shipped
    with pytest.raises(PlanError, match=r"mytool\.prune\.ChannelPlan has the kind 'prune\.channels/1', which is taken "
                                        r"by featherweight\.prune\..*\.ChannelPlan; .* kind: ClassVar\[str\] = "
                                        r'"mytool\.channel/1"'):
        defined("ChannelPlan", "mytool.prune", kind="prune.channels/1")
    mine = defined("ChannelPlan", "mytool.prune", kind="mytool.channel/1")
    assert plans["mytool.channel/1"] is mine
    assert type(Plan.from_json(shipped)) is fw.prune.ChannelPlan
    assert type(Plan.from_json(shipped.replace("prune.channels/1", "prune.ChannelPlan"))) is fw.prune.ChannelPlan


@pytest.mark.parametrize("kind", [None, "", "mine", "mine/0", "mine/1.5", "/1", "my tool/1", 3])
def test_a_plan_without_a_kind_is_refused_with_the_line_to_write(plans: dict[str, type[Plan]], kind: Any) -> None:
    given = {} if kind is None else {"kind": kind}
    with pytest.raises(PlanError, match=r'write kind: ClassVar\[str\] = "mytool\.sign_mean/1" into the class'):
        defined("SignMeanPlan", "mytool.share", **given)
    assert not [cls for cls in plans.values() if cls.__module__ == "mytool.share"]


def test_a_kind_is_not_inherited_and_abstract_plans_need_none(plans: dict[str, type[Plan]]) -> None:
    count = len(plans)

    class Between(Plan):
        @abstractmethod
        def more(self) -> int: ...

    assert len(plans) == count
    with pytest.raises(PlanError, match="has no kind"):
        type("Wider", (fw.prune.ChannelPlan,), {"__module__": "mytool"})


def test_a_module_may_be_executed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        plans: dict[str, type[Plan]]) -> None:
    (tmp_path / "plans_of_mine.py").write_text('''
from dataclasses import dataclass
from typing import ClassVar
from featherweight.steps import Plan

@dataclass(frozen=True)
class Mine(Plan):
    kind: ClassVar[str] = "mine/3"
    by: float = 1.0
    def apply(self, network): return network
    def summary(self): return "mine"
''')
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("plans_of_mine")
    text = module.Mine(2.0).to_json()
    again = importlib.reload(module)
    assert Plan.from_json(text) == again.Mine(2.0)
    assert plans["mine/3"] is again.Mine
    sys.modules.pop("plans_of_mine")


@pytest.mark.parametrize(("kind", "match"), [
    ("prune.channels/2", r"'prune\.channels/2' was written by a newer featherweight; this one reads prune\.channels/1"),
    ("quantize/10", "written by a newer featherweight"),
    ("prune.channel/1", r"unknown plan kind 'prune\.channel/1'; did you mean 'prune\.channels/1'"),
    ("prune.ChannelsPlan", "unknown plan kind"), ("prune.channels/x", "unknown plan kind"), (None, "unknown plan kind"),
    (["quantize/1"], "unknown plan kind"),
])
def test_a_kind_that_is_not_known_is_refused(kind: Any, match: str) -> None:
    with pytest.raises(PlanError, match=match):
        Plan.from_json(json.dumps({"kind": kind, "keep": {}}))


# ---- fields of plans

def nests(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all dataclasses in a plan."""
    if isinstance(value, torch.Tensor):
        return
    if dataclasses.is_dataclass(value):
        yield path
        for f in dataclasses.fields(value):
            yield from nests(getattr(value, f.name), (*path, f.name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from nests(item, (*path, key))
    elif isinstance(value, tuple):
        for key, item in enumerate(value):
            yield from nests(item, (*path, key))


@pytest.mark.parametrize("path", SAVED, ids=lambda p: p.stem)
def test_an_unknown_field_is_refused_wherever_it_stands(path: Path) -> None:
    plan = Plan.load(path)
    text, seen = plan.to_json(), set()
    assert Plan.from_json(text, plan.tensors) == plan
    for place in nests(plan):
        general = tuple("*" if isinstance(p, int) else p for p in place)
        if general in seen:
            continue
        seen.add(general)
        body = json.loads(text)
        inner = body
        for part in place:
            inner = inner[part]
        inner["novel"] = 1
        with pytest.raises(PlanError, match=rf"{'.'.join(map(str, (*place, 'novel')))}: no such field"):
            Plan.from_json(json.dumps(body), plan.tensors)


def test_there_are_nested_fields_of_every_sort_among_them() -> None:
    found = {tuple(p for p in place if isinstance(p, str)) for path in SAVED for place in nests(Plan.load(path))}
    assert {(), ("skipped",), ("stored",), ("points",), ("trail",), ("products",), ("blocks",), ("splits",),
            ("shared",)} <= found


@pytest.mark.parametrize(("change", "match"), [
    ({"tensors": {}}, "tensors: no such field"), ({"macs_after": "few"}, "macs_after: .*integer"),
    ({"skipped": [{"path": "a"}]}, r"skipped\.0\.reason: this field is missing"), ({"keep": None}, "keep: "),
    ({"sensitivity": [dataclasses.asdict(fw.prune.Curve("a", (0.5,), (0.1,), "output", 2)) | {"novel": 1}]},
     r"sensitivity\.0\.novel: no such field"),
])
def test_wrong_fields_are_named(change: dict[str, Any], match: str) -> None:
    body = json.loads(fw.prune.ChannelPlan({"a": (1,)}, {}, 4, 2).to_json())
    assert Plan.from_json(json.dumps(body))
    with pytest.raises(PlanError, match=rf"a prune\.channels/1 plan with wrong fields: {match}"):
        Plan.from_json(json.dumps(body | change))


# ---- options: none that is wrong survives the making of a recipe

OPTIONS: list[tuple[Any, str]] = [
    (Channels(), r"none of macs.*write Channels\(macs=0\.5\)"),
    (Channels(macs=0.5, params=0.5), "macs and params"),
    (Channels(macs=True), "macs is True: expected a number"),
    (Channels(macs=NAN), r"macs=nan; expected the fraction that remains, above 0 and up to 1.*Channels\(macs=0\.5\)"),
    (Channels(latency=0.0), r"latency=0\.0; expected the fraction that remains"),
    (Channels(macs=0.5, score="l3"), "no score 'l3'; did you mean 'l2'"),
    (Channels(macs=0.5, compensate="least_square"), "did you mean 'least_squares'"),
    (Channels(macs=0.5, iterations=0), "iterations=0; expected an integer from 1"),
    (Channels(macs=0.5, strength=NAN), r"strength=nan; .*the schedule's own"),
    (Channels(macs=0.5, end=NAN), "0 <= begin < end <= 1"),
    (Channels(macs=0.5, frequency=INF), "frequency above 0"),
    (Weights(score="magnitud"), "did you mean 'magnitude'"),
    (Weights(sparsity=NAN), "the fraction of zeros, from 0 and below 1"),
    (Weights(begin=True), "begin is True: expected a number"),
    (Weights(pattern="4:2"), "no pattern '4:2'"),
    (Layers(), r"write Layers\(count=2\)"),
    (Layers(count=0), "count=0; expected an integer from 1"),
    (Layers(count=1, batches=0), "batches=0; expected an integer from 1"),
    (Layers(count=1, kinds=("plains",)), r"did you mean 'plain'.*write kinds=\("),
    (LowRank(energy=NAN), r"energy=nan.*write energy=0\.95"),
    (LowRank(min_gain=NAN), "min_gain=nan; expected a number below 1"),
    (LowRank(min_gain=1.0), r"min_gain=1\.0"),
    (LowRank(ranks={"a": 0}), "rank of at least 1"),
    (LowRank(ranks={"a": True}), "expected a number"),
    (Codebook(bits=9), "512 entries; expected 2 to 256"),
    (Codebook(bits=10**9), "inf entries; expected 2 to 256"),
    (Codebook(clusters=1), "clusters=1; expected an integer from 2"),
    (Codebook(min_size=-1), "min_size=-1; expected an integer from 0"),
    (Codebook(bits=4, clusters=16), "write one of them"),
    (Quantize(weights="int9"), "did you mean 'int8'"),
    (Quantize(rounding="gptqq"), "did you mean 'gptq'"),
    (Quantize(calibration_batches=0), "calibration_batches=0; expected an integer from 1, or None for all"),
    (Quantize(smooth=NAN), "smooth=nan; expected a number from 0 and up to 1"),
    (Quantize(granularity=0), "granularity=0 is not known"),
    (Quantize(mixed={"head": "int99"}), "int99"),
    (Quantize(progressive=("int99",)), "'int99' is no form to train"),
    (Ladder(score_drop=NAN), "score_drop=nan; expected points of the score from 0"),
    (Ladder(split="test"), "chooses nothing"),
    (Ladder(rungs=("gtpq",)), "did you mean 'gptq'"),
    (Mixed(), "none of bytes, bits, latency"),
    (Mixed(bits=NAN), "bits=nan; expected a number above 0 and up to 32 bits"),
    (Mixed(bytes=1.5), r"bytes=1\.5; expected the fraction that remains"),
    (Mixed(bits=4, probes=0), "probes=0; expected an integer from 1"),
    (BatchNorm(batches=0), "batches=0.*expected 1 or more, or None for all"),
    (Train(epochs=-1), "epochs=-1; expected an integer from 0"),
    (Train(lr=INF), r"lr=inf; expected a number above 0, as in Train\(lr=0\.01\)"),
    (Train(momentum=1.0), r"momentum=1\.0; expected a number from 0 and below 1"),
    (Train(clip=0.0), r"clip=0\.0; expected a number above 0, or None for no limit"),
    (Train(optimizer="adam"), "did you mean 'adamw'"),
    (Train(checkpoint_every=NAN), "checkpoint_every=nan.*'epoch' or seconds"),
    (Train(distill=Logits(temperature=NAN)), "temperature=nan; expected a number above 0"),
    (Train(distill=Logits(weight=1.5)), "the teacher's share"),
    # rewrites at work during a training
    (Train(during=(Weights(score="magnitud"),)), "did you mean 'magnitude'"),
    (Train(during=(Channels(macs=0.5, compensate="bias"),)), "works at once"),
    (Train(during=(Weights(compensate="obs"),)), "works at once"),
    (Train(during=(Layers(count=1),)), "Layers cannot be used during training"),
    (Train(during=(LowRank(),)), "LowRank cannot be used during training"),
    (Train(during=(Codebook(importance="inputs"),)), 'write importance="none" in Train'),
    (Train(during=(Codebook(per="channel"),)), "not during training"),
    (Train(during=(Codebook(compensate="obs"),)), 'write compensate="none" in Train'),
    (Codebook(compensate="obc"), "did you mean 'obs'"),
    (Codebook(compensate="obs", importance="fisher"), "it weighs errors itself"),
    (Train(during=(Ladder(),)), r"Ladder cannot be used during training.*Train\(during=\(Quantize"),
    (Train(during=(Quantize(rounding="gptq"),)), "rounding='gptq' .* after Train"),
    (Train(during=(Quantize(granularity=4),)), "granularity=4 cannot be used during training"),
    (Train(during=(Quantize(learn="ttq"),)), "write weights='ternary', or learn='lsq'"),
    (Train(during=(Mixed(Quantize(learn="ttq", ends=None), bits=4, kinds=("int4",)),)),
     "write weights='ternary', or learn='lsq'"),
    (Train(during=(Mixed(Quantize(smooth=0.5, ends=None), bits=4),)),
     r"smooth=0\.5 is for networks that are trained no more"),
]


@pytest.mark.parametrize(("step", "match"), OPTIONS, ids=lambda value: str(value)[:60])
def test_a_wrong_option_does_not_survive_the_making_of_a_recipe(step: Any, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        fw.Recipe([Train(epochs=10), step])


@pytest.mark.parametrize("step", [
    Channels(macs=0.5, schedule="growing", strength=0.1), Weights(pattern="2:4"), Quantize("ternary", learn="ttq"),
    Quantize("int4", None, mixed={"head": "apot5"}, learn="apot"), Quantize("fp16", None, ends=None, learn="ttq"),
    Mixed(Quantize(learn="ttq", ends=None), bits=3, kinds=("ternary", "float")),
    Mixed(bytes=0.2, latency=None)], ids=str)
def test_what_can_be_at_work_in_a_training_is_let_through(step: Any) -> None:
    assert fw.Recipe([Train(during=(step,))]).steps[0].during == (step,)


@pytest.mark.parametrize("step", [Channels(macs=0.5, target="onyx"), Quantize(target="onyx")])
def test_an_unknown_target_is_refused_too(step: Any) -> None:
    with pytest.raises(ExportError, match="no target named 'onyx'"):
        fw.Recipe([step])


def test_a_jobs_target_is_refused_before_its_model_is_made() -> None:
    with pytest.raises(ExportError, match="did you mean 'onnxruntime'"):
        Job.from_toml('[model]\nfactory = "a:b"\n[task]\nfactory = "a:c"\n[compress]\ntarget = "onnxruntim"\n')


NEEDED = {"prune.Channels": {"macs": 0.5}, "prune.Layers": {"count": 1}, "balance.Mixed": {"bits": 4},
          "distill.BornAgain": {"train": Train()}}
SHIPPED = {kind: cls for kind, cls in kinds().items() if cls.__module__.startswith("featherweight.")}


def numeric() -> Iterator[tuple[str, str, bool]]:
    """(kind, option, whether it is an integer) of every option of a shipped step that may be a number."""
    for kind, cls in SHIPPED.items():
        for name, hint in get_type_hints(cls).items():
            sorts = {hint, *get_args(hint)} & {int, float}
            if sorts and name in {f.name for f in dataclasses.fields(cls)}:
                yield kind, name, float not in sorts


def test_there_are_numeric_options() -> None:
    found = list(numeric())
    assert len(found) > 50
    assert {("recover.Train", "lr", False), ("quantize.Quantize", "granularity", True)} <= set(found)


@pytest.mark.parametrize("kind", SHIPPED)
def test_no_number_is_nan_or_infinite_or_true(kind: str) -> None:
    """By the step's own check, and by the recipe, which may round nothing away before."""
    for _, option, whole in (row for row in numeric() if row[0] == kind):
        needed = {} if option in ("macs", "params", "bytes", "latency", "ratio", "bits") else NEEDED.get(kind, {})
        for value in (NAN, INF, -INF, True, *((1.5,) if whole else ())):
            step = SHIPPED[kind](**{**needed, option: value})
            with pytest.raises(RecipeError, match=rf"{option}( is |=){value!r}"):
                step.check()
            with pytest.raises(RecipeError, match=option):
                fw.Recipe([step if kind != "distill.Logits" else Train(distill=step)])


@pytest.mark.parametrize(("numbers", "yes", "no", "words"), [
    (Numbers(1, least=1, whole=True), (1, 10**400), (0, 1.0, True, None, "1", NAN), "an integer from 1"),
    (Numbers(1, above=0, most=1), (1, 0.5, 1e-9), (0, 1.1, None), "a number above 0 and up to 1"),
    (Numbers(1, least=0, below=1, none="all"), (0, None), (1, -1), "a number from 0 and below 1, or None for all"),
    (Numbers(1, noun="a share"), (-5, 0.0), (INF, -INF, NAN, 1j), "a share"),
])
def test_numbers(numbers: Numbers, yes: tuple[Any, ...], no: tuple[Any, ...], words: str) -> None:
    assert [numbers.hold(x) for x in (*yes, *no)] == [True] * len(yes) + [False] * len(no)
    assert str(numbers) == words


# ---- steps of one's own

@dataclass(frozen=True)
class Picky(Rewrite):
    stage: ClassVar[Stage] = Stage.SPARSITY
    by: int = 1

    def check(self) -> None:
        if self.by < 1:
            raise RecipeError(f"Picky(by={self.by}); write by=1")

    def plan(self, network: fw.Network, task: fw.Task) -> Plan:
        raise AssertionError("it is not reached")


@dataclass(frozen=True)
class Plain(Fit):
    by: int = 1
    inner: Picky | None = None

    def fit(self, network: fw.Network, task: fw.Task, context: Context) -> fw.Network:
        raise AssertionError("it is not reached")


@dataclass(frozen=True)
class Term:
    by: int = 1

    def check(self) -> None:
        Picky(self.by).check()

    def begin(self, network: fw.Network, context: Context) -> Any: ...


@pytest.mark.parametrize("step", [Picky(0), Train(distill=Term(0)), Plain(inner=Picky(0))])
def test_a_recipe_calls_the_check_of_every_step_and_of_those_in_it(step: Any) -> None:
    assert fw.Recipe([Picky(), Plain(), Train(distill=Term())])
    with pytest.raises(RecipeError, match="write by=1"):
        fw.Recipe([step])


def test_a_step_without_a_start_is_refused_during_training_when_the_recipe_is_made() -> None:
    with pytest.raises(RecipeError, match="Picky cannot be used during training"):
        fw.Recipe([Train(during=(Picky(),))])
    with pytest.raises(RecipeError, match="Picky cannot be used during training"):
        Picky().start(small(), fw.Task())


# ---- fingerprints

def small(seed: int = 0) -> fw.Network:
    torch.manual_seed(seed)
    return fw.capture(nn.Linear(4, 3), torch.randn(2, 4))


def test_a_step_is_named_by_its_kind() -> None:
    for kind, cls in kinds().items():
        assert kind_of(object.__new__(cls)) == kind
    assert kind_of(Picky()) == f"{__name__}.Picky"


def test_states_name_steps_by_kind_and_by_the_options_that_are_not_at_their_defaults() -> None:
    """What is stored on disk: a change here makes stored jobs unreadable, and asks for a new format."""
    steps = fw.Recipe([
        Channels(macs=0.5, ignore=("head",), score="l1"),
        Train(epochs=2, lr=0.01, distill=Logits(weight=1.0), during=(Weights(sparsity=0.5),)),
        Quantize(mixed={"head": "int8"})]).steps
    assert canonical(steps) == [
        ["prune.Channels", {"macs": 0.5, "ignore": ["head"]}],
        ["recover.Train", {"epochs": 2, "distill": ["distill.Logits", {"weight": 1.0}],
                           "during": [["prune.Weights", {"sparsity": 0.5}]]}],
        ["quantize.Quantize", {"mixed": {"head": "int8"}}]]


def in_module(module: str, **options: Any) -> Any:
    """A step "prune.Moved" of ours as this module would define it, with options and their defaults."""
    cls = dataclasses.make_dataclass("Moved", [(n, type(v), dataclasses.field(default=v)) for n, v in options.items()],
                                     frozen=True, namespace={"__module__": module})
    cls.__module__ = module
    return cls


def test_a_fingerprint_outlives_that_a_class_moves_and_gets_an_option() -> None:
    before = in_module("featherweight.prune.steps", share=0.5)
    after = in_module("featherweight.prune.moved.step", share=0.5, kinds=("a",), more=None)
    network = small()
    assert fingerprint(before(0.25), network, seed=1) == fingerprint(after(0.25), network, seed=1)
    assert fingerprint(before(), network) == fingerprint(after(), network)
    others: list[Callable[[], str]] = [
        lambda: fingerprint(before(0.3), network, seed=1), lambda: fingerprint(after(0.25, ("b",)), network, seed=1),
        lambda: fingerprint(before(0.25), small(1), seed=1), lambda: fingerprint(before(0.25), network, seed=2),
        lambda: fingerprint(in_module("featherweight.share.steps", share=0.5)(0.25), network, seed=1)]
    assert len({other() for other in others} | {fingerprint(before(0.25), network, seed=1)}) == 6


# ---- formats of states

@pytest.mark.parametrize(("stored", "error", "match"), [
    ({"format": 1, "recipe": []}, RecipeError, r"version 0\.1 of featherweight wrote.*resume=False to start over"),
    ({"format": JOB_FORMAT + 1}, RecipeError, r"a newer version of featherweight wrote.*out=another folder"),
    ({"format": JOB_FORMAT, "recipe": ["other"]}, RecipeError, r"another job \(other: recipe\)"),
    ({"recipe": []}, FileError, "names no format"), ([], FileError, "names no format"), (None, FileError, "no format"),
])
def test_the_state_of_a_job_is_refused_truthfully(tmp_path: Path, stored: Any, error: type[Exception],
                                                  match: str) -> None:
    mark = {"format": JOB_FORMAT, "recipe": []}
    state = State(tmp_path / "state")
    state.claim(mark, resume=True)
    state.claim(mark, resume=True)
    (tmp_path / "state" / "fingerprint.json").write_text(json.dumps(stored))
    with pytest.raises(error, match=match):
        state.claim(mark, resume=True)
    state.claim(mark, resume=False)
    state.claim(mark, resume=True)


@pytest.mark.parametrize(("form", "match"), [
    ("featherweight checkpoint 1", r"written by version 0\.1 of featherweight"),
    ("featherweight checkpoint 3", "written by a newer version of featherweight"),
])
def test_a_checkpoint_of_another_version_is_refused_truthfully(tmp_path: Path, form: str, match: str) -> None:
    held = Checkpoint(Position(1, 2, 3), {"a": torch.ones(2)}, {"b": 1})
    checkpoint.write(tmp_path, "mark", held)
    found = checkpoint.read(tmp_path, "mark")
    assert found is not None
    assert (found.position, found.numbers, found.tensors["a"].tolist()) == (held.position, held.numbers, [1, 1])
    file = tmp_path / checkpoint.FILE
    with safe_open(file, "pt") as opened:
        meta = opened.metadata()
    save_file(dict(held.tensors), file, meta | {"format": form})
    for mark in ("mark", "another"):
        with pytest.raises(RecipeError, match=match + r".*delete it to start over"):
            checkpoint.read(tmp_path, mark)
