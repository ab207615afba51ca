"""Features, relations and strategies at work beside a training: matched, trained along, resumed, gone at the end."""

from __future__ import annotations

import dataclasses
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight.distill import (
    BornAgain,
    Exits,
    Features,
    Logits,
    Mutual,
    OwnPast,
    Regression,
    Relations,
    Smoothing,
)
from featherweight.distill import features as features_file
from featherweight.distill import relations as relations_file
from featherweight.distill.cache import OutputCache
from featherweight.distill.losses import feature, relation
from featherweight.distill.losses.response import divergence
from featherweight.distill.strategies import online
from featherweight.distill.taps.match import kept_channels, match
from featherweight.distill.taps.places import layers, places, stages, trunk
from featherweight.distill.teachers import started
from featherweight.errors import RecipeError
from featherweight.network.file.digest import digest
from featherweight.recover import Train, attach
from featherweight.recover.companions import Companions
from featherweight.steps import Context
from problems import CLASSES, PROBLEMS, images, network, task
from two_processes import run_by_two

torch.set_num_threads(1)
CPU = torch.device("cpu")


class Maps(nn.Module):
    """A small network of two resolutions with its own paths and widths."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, padding=1), nn.ReLU())
        self.out = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.late(self.early(x)).mean((2, 3)))


def maps(width: int = 6, seed: int = 0) -> fw.Network:
    torch.manual_seed(seed)
    return fw.capture(Maps(width).eval(), images(2))


def cut() -> tuple[fw.Network, fw.Network, Any]:
    parent = network(PROBLEMS["residual"])
    plan = fw.prune.Channels(macs=0.5).plan(parent, fw.Task())
    return plan.apply(parent), parent, plan


# ---- places and matches

def test_the_trunk_is_what_every_path_goes_through() -> None:
    """Against cutting each node out: the output is no longer reached from the input."""
    net = network(PROBLEMS["residual"])
    order = list(net.graph.nodes)
    output = order[-1]

    def reached_without(name: str) -> bool:
        seen = {n for n in order if n.op == "placeholder"}
        for node in order:
            if node.name != name and any(u in seen for u in node.all_input_nodes):
                seen.add(node)
        return output in seen

    known = places(net)
    last = output.all_input_nodes[0].name
    wanted = [n for n in known if n != last and not reached_without(n)]
    assert [p.node for p in trunk(net)] == wanted
    assert len(wanted) > 5
    assert [p.path for p in stages(net)] == ["layer1.1", "layer2.1"]


def test_places_know_their_channels() -> None:
    for problem, path, width, resolution in (("residual", "layer1.0", 8, (8, 8)), ("conv1d", "0", None, None),
                                             ("attention", None, None, None)):
        net = network(PROBLEMS[problem])
        found = layers(net)
        assert found
        if path is not None and width is not None:
            place = next(p for p in found if p.path == path)
            assert (place.width, place.resolution) == (width, resolution)
        for place in found:
            assert place.width in (place.shape[0], place.shape[-1])


def test_a_child_is_matched_at_its_parents_paths_and_kept_channels_are_compared() -> None:
    """Values put in by hand: the parent's activation, with the channels that the plan cuts taken out."""
    small, parent, plan = cut()
    found = match(small, parent, "layers", (plan,))
    assert all(m.student.path == m.teacher.path for m in found.found)
    assert all(m.direct for m in found.found)
    fewer = [m for m in found.found if m.kept is not None]
    assert len(fewer) > 4
    zeroed = plan.zero(parent)  # computes what the cut network computes, at the parent's widths
    x = images(3)
    seen: dict[str, Tensor] = {}
    ours: dict[str, Tensor] = {}
    taps = {m.teacher.node: (lambda v, n=m.teacher.node: seen.update({n: v})) for m in fewer}
    own = {m.student.node: (lambda v, n=m.student.node: ours.update({n: v})) for m in fewer}
    with torch.no_grad(), zeroed.taps(taps), small.taps(own):  # type: ignore[arg-type]
        zeroed(x)
        small(x)
    for m in fewer:
        torch.testing.assert_close(ours[m.student.node], seen[m.teacher.node].index_select(m.teacher.axis, m.kept),
                                   rtol=1e-4, atol=1e-5)


def test_two_cuts_one_after_the_other_are_followed() -> None:
    small, parent, plan = cut()
    second = fw.prune.Channels(ratio=0.6).plan(small, fw.Task())
    smaller = second.apply(small)
    place = next(p for p in layers(parent) if p.path == "layer2.1.conv1")
    kept = kept_channels(parent, [place], (plan, second))[place.node]
    assert len(kept) == smaller.tensor("layer2.1.conv1.weight").shape[0]
    rows = parent.tensor("layer2.1.conv1.weight")[kept].abs().sum((2, 3))
    left = smaller.tensor("layer2.1.conv1.weight").abs().sum((2, 3))
    for row, own in zip(rows, left[:, 0], strict=True):
        assert bool(torch.isclose(row, own, atol=1e-6).any())


def test_others_are_matched_by_resolution_and_what_is_not_is_said() -> None:
    found = match(maps(), network(PROBLEMS["residual"]), "stages")
    assert [(m.student.path, m.teacher.path) for m in found.found] == [("early.2", "layer1.1"), ("late.1", "layer2.1")]
    assert [m.direct for m in found.found] == [False, False]
    deep = match(maps(), network(PROBLEMS["conv_bn"]), "stages")
    assert any("no activation of this resolution" in s.reason for s in deep.skipped) or len(deep.found) == 2
    notes = found.notes("distill.Features", True)
    assert notes[0] == ("distill.Features compares early.2 with layer1.1 (6 to 8 channels by a projector); late.1 with "
                        "layer2.1 (12 to 16 channels by a projector)")
    with pytest.raises(RecipeError, match=r"the student has no module 'layer9'"):
        match(maps(), maps(), {"layer9": "early"})


# ---- features and relations

class Killed(Exception):
    pass


FEATURES = [name for name, row in features_file.LOSSES.items() if not row.tokens]
TERMS: dict[str, Any] = {
    **{f"features {n}": Features(n) for n in FEATURES},
    **{f"relations {n}": Relations(n) for n in (*relations_file.LOSSES, "crd")},
    "label smoothing": Smoothing(), "own past": OwnPast(every=0.3), "exits": Exits(),
    "dml": Mutual(), "one": Mutual(loss="one", peers=2), "kdcl": Mutual(loss="kdcl"),
    "dkd": Logits(loss="dkd"), "dist": Logits(loss="dist"), "mlkd": Logits(loss="mlkd"),
    "standardized": Logits(standardize=True),
}
#: of these only the kinds of a companion are killed: each holds what it must keep
KILLED = ("features hint", "features mgd", "relations crd", "own past", "exits", "one", "dkd")


@cache
def untaught() -> str:
    """The digest of what the same training without a term gives."""
    return digest(Train(epochs=1, lr=0.02).fit(maps(), task(PROBLEMS["residual"]), Context()))


#: those that every run tries, one of each kind; the others differ by their formula, which test_distill_losses holds
ALWAYS = ("features hint", "features mgd", "features review", "relations rkd", "relations crd", "exits", "dkd")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in ALWAYS)) for n in TERMS])
def test_every_term_trains_a_student_of_another_form(name: str) -> None:
    """The result has the student's own graph and tensors, no tap, and is another than without the term."""
    student, teacher = maps(), network(PROBLEMS["residual"])
    step = Train(epochs=1, lr=0.02, beside=(TERMS[name],))
    found = step.fit(student, task(PROBLEMS["residual"]), Context(original=teacher))
    assert {n: t.shape for n, t in found.tensors().items()} == {n: t.shape for n, t in student.tensors().items()}
    assert not found._taps
    assert all(bool(torch.isfinite(t).all()) for t in found.tensors().values())
    assert digest(found) != untaught()


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_training_goes_on_alike(name: str, tmp_path: Path) -> None:
    row, teacher = PROBLEMS["residual"], network(PROBLEMS["residual"])
    step = Train(epochs=2, lr=0.02, checkpoint_every=0.0, beside=(TERMS[name],))

    def kill(what: str, done: float, total: float, figures: Any) -> None:
        if done == 4:
            raise Killed("at step 4")

    with pytest.raises(Killed, match="at step 4"):
        step.fit(maps(), task(row), Context(original=teacher, workdir=tmp_path, progress=kill))
    told: list[float] = []
    resumed = step.fit(maps(), task(row), Context(
        original=teacher, workdir=tmp_path, progress=lambda what, done, total, figures: told.append(done)))
    assert told[0] == 4
    assert digest(resumed) == digest(step.fit(maps(), task(row), Context(original=teacher)))


def values(net: fw.Network, path: str, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    node = fw.distill.taps.output_node(net, path)
    with net.taps({node: seen.append}):  # type: ignore[dict-item]
        net(x)
    return seen[-1]


def test_terms_are_those_of_the_formulas() -> None:
    small, parent, plan = cut()
    x, y = images(4), torch.tensor([0, 1, 2, 3])
    context = Context(original=parent, plans=(plan,))
    things = (Features(taps=("layer1.0.conv1",), weight=0.5), Relations("distance", taps=("layer2",), weight=2.0))
    companions = Companions(things, small, fw.Task(loss=F.cross_entropy), context)
    terms = companions.terms(x, small(x), y)
    place = next(p for p in layers(parent) if p.path == "layer1.0.conv1")
    kept = kept_channels(parent, [place], (plan,))[place.node]
    wanted = values(parent, "layer1.0.conv1", x).detach()[:, kept]
    size = wanted.square().mean().sqrt()
    torch.testing.assert_close(terms["distill.Features"],
                               0.5 * feature.hint(values(small, "layer1.0.conv1", x) / size, wanted / size))
    pooled = [values(net, "layer2", x).mean((2, 3)) for net in (small, parent)]
    torch.testing.assert_close(terms["distill.Relations"], 2 * relation.distance(*pooled))
    companions.close()
    assert not small._taps


def test_a_features_term_ends_where_it_is_told_to() -> None:
    student, teacher, x = maps(), network(PROBLEMS["residual"]), images(4)
    companions = Companions((Features(end=0.5),), student, fw.Task(loss=F.cross_entropy), Context(original=teacher))
    for progress, there in ((0.2, True), (0.6, False)):
        companions.update(progress)
        assert ("distill.Features" in companions.terms(x, student(x), torch.zeros(4, dtype=torch.long))) == there


class Attending(nn.Module):
    """Tokens [n, t, width] that attend to one another, by a fused call or by hand."""

    def __init__(self, width: int, heads: int, fused: bool, causal: bool = False) -> None:
        super().__init__()
        self.read, self.out = nn.Linear(6, width), nn.Linear(width, 4)
        self.parts = nn.Linear(width, 3 * width)
        self.heads, self.fused, self.causal = heads, fused, causal

    def forward(self, tokens: Tensor, seen: Tensor) -> Tensor:
        x = self.read(tokens)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.parts(x).chunk(3, 2))
        shown = seen[:, None, None, :]
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, None if self.causal else shown, is_causal=self.causal)
        else:
            y = self.map(q, k, shown) @ v
        return self.out(y.transpose(1, 2).flatten(2).mean(1))

    def map(self, q: Tensor, k: Tensor, shown: Tensor) -> Tensor:
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1) if self.causal else ~shown
        return scores.masked_fill(hidden, -1e9).softmax(-1)

    def attention(self, tokens: Tensor, seen: Tensor) -> Tensor:
        q, k, _ = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.parts(self.read(tokens)).chunk(
            3, 2))
        return self.map(q, k, seen[:, None, None, :])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("fused", "heads"), [(True, 2), (False, 4)])
def test_attention_maps_are_those_that_the_modules_make(fused: bool, heads: int, causal: bool) -> None:
    """Of fused calls they are made of queries, keys and mask; heads are averaged where their numbers differ."""
    torch.manual_seed(0)
    one, other = Attending(8, heads, fused, causal).eval(), Attending(12, 4, True, causal).eval()
    inputs = torch.randn(3, 5, 6), torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 4 + [False]])
    student, teacher = (fw.capture(m, inputs) for m in (one, other))
    term = Features("maps", taps="attention", mask=lambda given, target: given[1])
    companions = Companions((term,), student, fw.Task(loss=F.cross_entropy), Context(original=teacher))
    found = companions.terms(inputs, student(*inputs), torch.zeros(3, dtype=torch.long))["distill.Features"]
    companions.close()
    wanted, count = 0.0, 0
    maps_ = [m.attention(*inputs).mean(1, keepdim=True) if heads != 4 else m.attention(*inputs) for m in (one, other)]
    for sample in range(3):
        for query in range(5):
            if inputs[1][sample, query]:
                for a, b in zip(*(m[sample, :, query].flatten().tolist() for m in maps_), strict=True):
                    wanted, count = wanted + (a - b) ** 2, count + 1
    assert float(found.detach()) == pytest.approx(wanted / count, rel=1e-4)


def test_maps_are_asked_of_attention_only() -> None:
    with pytest.raises(RecipeError, match=r'write Features\(\'maps\', taps="attention"\)'):
        Features("maps").check()
    with pytest.raises(RecipeError, match="matched nothing of the student with the teacher"):
        match(maps(), network(PROBLEMS["residual"]), "attention")


def test_padding_does_not_count() -> None:
    """Where the mask is false, the student may give whatever it wants."""
    student, teacher, x = maps(), network(PROBLEMS["residual"]), images(4)

    def mask(inputs: Any, target: Any) -> Tensor:
        inside = torch.zeros(4, 8, 8)
        inside[:, :, :4] = 1
        return inside

    for name in ("hint", "fgd", "cwd"):
        term = Features(name, taps={"early": "layer1"}, mask=mask).start(student, fw.Task(), Context(original=teacher))
        student(x)
        found = term.loss(x, None, None)
        node = fw.distill.taps.output_node(student, "early")
        remove = student.add_tap(node, lambda v: torch.cat([v[..., :4], v[..., 4:] + 1], -1))
        term.close()
        other = Features(name, taps={"early": "layer1"}, mask=mask).start(student, fw.Task(), Context(original=teacher))
        assert found is not None
        student(x)
        changed = other.loss(x, None, None)
        other.close()
        remove()
        if name == "fgd":
            assert not torch.equal(changed, found)  # the background counts less, and counts
        else:
            torch.testing.assert_close(found, changed)


def test_peers_learn_too_and_from_one_another() -> None:
    student, x, y = maps(), images(4), torch.tensor([0, 1, 2, 3])
    peer = maps(seed=5)
    companion = Mutual(peers=(peer,), temperature=2.0, weight=0.5).start(student, fw.Task(), Context())
    output = student(x)
    other = companion.peers[0](x)  # type: ignore[attr-defined]
    wanted = F.cross_entropy(other, y) + 0.5 * (divergence(output, other, 2.0) + divergence(other, output, 2.0))
    companion_again = Mutual(peers=(peer,), temperature=2.0, weight=0.5).start(student, fw.Task(), Context())
    torch.testing.assert_close(companion_again.loss(x, output, y), wanted)
    assert len(companion.parameters()) == len(list(peer.parameters()))
    logits = [torch.randn(4, 5) for _ in range(3)]
    lowest = torch.stack([z - z.gather(1, y[:, None]) for z in logits]).amin(0)
    torch.testing.assert_close(online.collaborative(logits, y, 1.0), sum(divergence(z, lowest, 1.0) for z in logits))


def test_born_again_is_the_training_of_fresh_networks_one_after_another(tmp_path: Path) -> None:
    net, row = maps(), PROBLEMS["residual"]
    train = Train(epochs=1, lr=0.05)
    born = BornAgain(train, generations=2).fit(net, task(row), Context(workdir=tmp_path, seed=3))
    again = BornAgain(train, generations=2).fit(net, task(row), Context(workdir=tmp_path, seed=3))
    assert digest(again) == digest(born)
    assert digest(born) != digest(BornAgain(train).fit(net, task(row), Context(seed=3)))
    assert not torch.equal(born.tensor("out.weight"), net.tensor("out.weight"))
    with pytest.raises(RecipeError, match=r"expected a training without a teacher"):
        fw.Recipe([BornAgain(Train(distill=Logits()))])


# ---- teachers

def test_modules_functions_and_several_teach_as_networks_do() -> None:
    torch.manual_seed(1)
    models = [Maps(4).eval(), Maps(5).train()]
    nets = [fw.capture(m, images(2)) for m in (models[0], Maps(5).eval())]
    student, x = maps(), images(4)
    output = student(x)

    def term(teacher: Any) -> Tensor:
        found = Logits(weight=1.0, teacher=teacher).start(student, fw.Task(), Context()).loss(x, output, None)
        assert found is not None
        return found

    torch.testing.assert_close(term(nets[0]), term(models[0]))
    torch.testing.assert_close(term(nets[0]), term(lambda images: models[0](images).detach()))
    both = (nets[0](x) + nets[1](x)).detach() / 2
    torch.testing.assert_close(term((nets[0], nets[1])), divergence(output, both, 4.0))
    before = models[1].early[1].running_mean.clone()
    term(models[1])
    assert models[1].training
    assert models[1].early[1].training
    assert torch.equal(models[1].early[1].running_mean, before)
    with pytest.raises(RecipeError, match=r"expected a Network, the path of a saved one"):
        term(3)
    with pytest.raises(RecipeError, match=r"write teacher=fw\.capture"):
        Features(teacher=models[0]).start(student, fw.Task(), Context())


def test_one_teacher_runs_once_a_batch_for_all_companions() -> None:
    student, teacher = maps(), network(PROBLEMS["residual"])
    counted: list[int] = []
    things = (Logits(), Features(), Relations("distance"))
    companions = Companions(things, student, fw.Task(loss=F.cross_entropy), Context(original=teacher))
    shared = companions.all[0].teacher  # type: ignore[attr-defined]
    shared.network.add_tap(next(iter(places(shared.network))), lambda v: counted.append(1))
    for _ in range(3):
        x = images(4)
        companions.terms(x, student(x), torch.zeros(4, dtype=torch.long))
    assert len(counted) == 3
    x.add_(1)  # the same tensor, other numbers
    companions.terms(x, student(x), torch.zeros(4, dtype=torch.long))
    assert len(counted) == 4


# ---- cached outputs

def test_outputs_are_cached_by_content(tmp_path: Path) -> None:
    student, teacher = maps(), network(PROBLEMS["residual"])
    step = Train(epochs=2, lr=0.02, distill=Logits(cache=str(tmp_path / "outputs")))
    work, context = task(PROBLEMS["residual"]), Context(original=teacher)
    cold = step.fit(student, work, context)
    files = list((tmp_path / "outputs").rglob("*.safetensors"))
    assert files
    assert digest(step.fit(student, work, context)) == digest(cold)
    cache = OutputCache(tmp_path / "outputs", started(teacher, None, CPU, "Logits"))
    seen = [x for x, _ in work.batches("train")]
    for x in seen:
        found = cache.outputs(x)
        assert found is not None
        with torch.no_grad():
            torch.testing.assert_close(found, teacher(x), rtol=2e-3, atol=2e-3)
    assert cache.hit_rate == 1
    assert cache.file_bytes == sum(f.stat().st_size for f in files)
    assert cache.outputs(seen[0] + 1) is None
    other = OutputCache(tmp_path / "outputs", started(maps(), None, CPU, "Logits"))
    assert other.outputs(seen[0]) is None


def test_torn_and_foreign_files_are_refused_in_words(tmp_path: Path) -> None:
    teachers = [started(net, None, CPU, "Logits") for net in (maps(), maps(seed=1))]
    caches = [OutputCache(tmp_path, t) for t in teachers]
    x = images(4)
    for kept, teacher in zip(caches, teachers, strict=True):
        kept.outputs(x, teacher.values(x)[0])
        kept.flush()
    [file], [foreign] = (list(c.folder.glob("*.safetensors")) for c in caches)
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(RecipeError, match=r"cannot be read .*delete this file"):
        OutputCache(tmp_path, teachers[0])
    file.write_bytes(foreign.read_bytes())
    with pytest.raises(RecipeError, match=r"of another teacher .*Logits\(cache=another_folder\)"):
        OutputCache(tmp_path, teachers[0])
    with pytest.raises(RecipeError, match="a function cannot be cached"):
        Logits(teacher=lambda x: x, cache=str(tmp_path)).start(maps(), fw.Task(), Context())


# ---- regression, masks, words

def test_a_bounded_regression_and_what_does_not_fit() -> None:
    net, x, y = maps(), images(4), torch.randn(4, CLASSES)
    teacher = maps(seed=3)
    term = Regression(weight=2.0, teacher=teacher).start(net, fw.Task(), Context())
    own, bound = ((n(x) - y).square().sum(1) for n in (net, teacher))
    torch.testing.assert_close(term.loss(x, net(x), y), 2 * torch.where(own > bound, own, 0.0).mean())
    with pytest.raises(RecipeError, match="expected one shape"):
        term.loss(x, net(x), torch.randn(4))
    with pytest.raises(RecipeError, match="needs integer target classes"):
        Smoothing().start(net, fw.Task(), Context()).loss(x, net(x), None)


def test_a_sequences_padding_is_named_by_an_input() -> None:
    logits, wanted = torch.randn(2, 6, 5), torch.randn(2, 6, 5)
    inputs = {"ids": torch.zeros(2, 6), "attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])}
    options = Logits(weight=1.0, axis=-1, mask="attention_mask", teacher=lambda ids, attention_mask: wanted)
    mask = inputs["attention_mask"].bool()
    found = options.start(maps(), fw.Task(), Context()).loss(inputs, logits, None)
    torch.testing.assert_close(found, divergence(logits[mask], wanted[mask], 4.0))
    other = dataclasses.replace(options, mask="attention").start(maps(), fw.Task(), Context())
    with pytest.raises(RecipeError, match="did you mean 'attention_mask'"):
        other.loss(inputs, logits, None)


@pytest.mark.parametrize(("thing", "message"), [
    (Features("hints"), "did you mean 'hint'"), (Features(weight=0), "weight=0"), (Relations("crds"), "did you mean"),
    (Mutual(loss="dmls"), "did you mean 'dml'"), (Mutual(peers=0), "peers=0"), (Exits(share=2), "share=2"),
    (OwnPast(every=0), "every=0"), (Smoothing(1.5), "share=1.5"), (Regression(margin=-1), "margin=-1"),
    (Logits(loss="dks"), "did you mean 'dkd'"), (Mutual(peers=("a",)), "how many copies, or networks"),
])
def test_wrong_options_are_refused_when_the_recipe_is_made(thing: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        fw.Recipe([Train(beside=(thing,))])


def test_a_recipe_knows_what_was_kept_and_shows_the_terms(tmp_path: Path) -> None:
    """Cut, then taught by the activations of the original: by one word, and the channels are compared directly."""
    net, work = network(PROBLEMS["mlp"]), task(PROBLEMS["mlp"])
    train = Train(epochs=3, lr=0.01, beside=(Logits(), Features(taps="layers")))
    recipe = fw.Recipe([fw.prune.Channels(macs=0.5), train])
    assert fw.Recipe.from_toml(recipe.to_toml()) == recipe
    done = fw.compress(net, work, recipe, out=tmp_path, seconds=0.0)
    [note] = [n for n in done.notes if n.startswith("distill.Features compares")]
    assert "kept of" in note
    assert "projector" not in note
    assert done.losses.keys() == {"2"}
    assert done.losses["2"].keys() == {"loss", "task", "distill.Logits", "distill.Features"}
    for row in zip(*done.losses["2"].values(), strict=True):
        assert row[0] == pytest.approx(sum(row[1:]), rel=1e-4)
    assert len(done.losses["2"]["loss"]) == 3
    page = (tmp_path / "report.html").read_text()
    assert "step 2: the loss and its terms" in page
    assert page.count("<title>distill.Features</title>") == 1
    assert fw.compress(net, work, recipe, out=tmp_path, seconds=0.0).losses == done.losses


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from accelerate import PartialState
from pathlib import Path
import test_distill_companions as t
from featherweight.distill import Features, Logits, Mutual, Relations
from featherweight.recover.companions import Companions
banks = []
plain = Companions.finish
def finish(self, origin):
    banks.append(self.all[1].bank.clone())
    return plain(self, origin)
Companions.finish = finish
out = Path({out!r})
things = (Features(), Relations("crd", bank=16), Logits(cache=str(out / "outputs")), Mutual())
net = t.Train(epochs=2, lr=0.02, beside=things).fit(t.maps(), t.task(t.PROBLEMS["residual"]), t.Context(
    original=t.network(t.PROBLEMS["residual"]), workdir=out / "work"))
torch.save(dict(tensors=dict(net.state_dict()), bank=banks[0]), out / f"{{PartialState().process_index}}.pt")
"""


def test_two_processes_learn_alike_and_keep_one_bank(tmp_path: Path) -> None:
    """Weights and the memory bank are the same in both; each sample's outputs are cached by one of them."""
    one, other = run_by_two(SCRIPT, tmp_path)
    assert all(torch.equal(tensor, other["tensors"][name]) for name, tensor in one["tensors"].items())
    assert torch.equal(one["bank"], other["bank"])
    kept = [safetensors.torch.load_file(f)["codes"] for f in (tmp_path / "outputs").rglob("*.safetensors")]
    codes = [bytes(row.tolist()) for rows in kept for row in rows]
    assert codes
    assert len(codes) == len(set(codes))


# ---- in a loop of one's own

def test_attach_does_what_train_does() -> None:
    small, parent, plan = cut()
    work = task(PROBLEMS["residual"])
    things = (Logits(weight=0.5), Features(taps="layers", weight=0.1))
    wanted = Train(epochs=1, lr=0.05, schedule="constant", weight_decay=0.0, beside=things).fit(
        small, work, Context(original=parent, plans=(plan,)))
    net = small.copy().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    batches = list(work.batches("train"))
    attached = attach(net, work, things, steps=len(batches), optimizer=optimizer, original=parent, plans=(plan,))
    for x, y in batches:
        optimizer.zero_grad()
        attached.loss(x, net(x), y).backward()
        optimizer.step()
    assert attached.terms.keys() == {"task", "distill.Logits", "distill.Features"}
    assert digest(attached.finish()) == digest(wanted)


@pytest.mark.slow
def test_the_example_of_a_loop_of_ones_own_runs() -> None:
    path = Path(__file__).parents[1] / "examples/distill_in_your_loop/train.py"
    found = runpy.run_path(str(path))["main"]()
    assert list(found) == ["original", "cut", "trained alone", "taught by outputs", "and by activations"]
    assert all(score > found["cut"] for name, score in found.items() if name != "cut")


# ---- other children, other tasks

@pytest.mark.parametrize("name", ["quantized", "shallow", "in low bits", *(
    pytest.param(n, marks=pytest.mark.slow) for n in ("factorized", "while it is cut"))])
def test_every_child_is_matched_to_its_parent(name: str) -> None:
    """By path, whatever made the child; of what was factorized and dropped the rest."""
    parent, work = network(PROBLEMS["residual"]), task(PROBLEMS["residual"])
    steps: dict[str, fw.steps.Rewrite] = {
        "quantized": fw.quantize.Quantize(activations=None),
        "factorized": fw.factorize.LowRank(energy=0.7, min_gain=0.0),
        "shallow": fw.distill.Student(width=1.0, depth=0.5)}
    beside: dict[str, tuple[Any, ...]] = {
        "in low bits": (fw.quantize.Quantize("int4", "uint4"),),
        "while it is cut": (fw.prune.Channels(macs=0.6, frequency=0.2),)}
    plans = (steps[name].plan(parent, work),) if name in steps else ()
    child = plans[0].apply(parent) if plans else parent
    found = match(child, parent, "trunk", plans)
    assert len(found.found) > 3
    assert all(m.student.path == m.teacher.path and m.direct for m in found.found)
    if name == "shallow":
        assert found.skipped
    if name == "quantized":  # its integers are not trained: in training it is "in low bits"
        return
    things = (*beside.get(name, ()), Features(taps="trunk"), Logits(weight=0.5))
    trained = Train(epochs=1, lr=0.01, beside=things).fit(child, work, Context(original=parent, plans=plans))
    assert trained.notes[-1].startswith("distill.Features")


class Detector(nn.Module):
    """A backbone with two maps of features, and a head that a capture leaves to Python."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.stem(x)
        return {"fine": fine, "coarse": self.down(fine)}


def test_a_captured_part_learns_beside_a_head_in_python() -> None:
    """FGD on a pyramid's two maps, what lies in boxes first, in a loop of one's own with a loss of one's own."""
    torch.manual_seed(0)
    student, teacher = (fw.capture(Detector(w).eval(), images(2)) for w in (4, 8))
    head = nn.Conv2d(8, 2, 1)
    boxes = torch.zeros(4, 8, 8)
    boxes[:, 2:6, 2:6] = 1
    term = Features("fgd", taps=("stem", "down"), mask=lambda inputs, target: target["inside"], weight=0.1)
    optimizer = torch.optim.SGD([*student.parameters(), *head.parameters()], lr=0.05)
    attached = attach(student.train(), fw.Task(), (term,), steps=8, optimizer=optimizer, original=teacher)
    told = []
    for _ in range(8):
        x = images(4)
        target = {"inside": boxes}
        optimizer.zero_grad()
        features = student(x)
        own = head(features["coarse"]).square().mean()
        attached.loss(x, features, target, own=own).backward()
        optimizer.step()
        told.append(float(attached.terms["distill.Features"]))
    assert told[-1] < told[0]
    finished = attached.finish()
    assert {n: t.shape for n, t in finished.tensors().items()} == {n: t.shape for n, t in student.tensors().items()}
    assert any("(4 to 8 channels by a projector)" in note for note in finished.notes)


def test_a_student_keeps_the_largest_channels_and_every_other_block() -> None:
    net = network(PROBLEMS["residual"])
    plan = fw.distill.Student(width=0.5).plan(net, fw.Task())
    for name, kept in plan.keep.items():
        group = fw.prune.axis_groups(net)[name]
        size = [0.0] * len(group)
        for m in group.members:
            rows = net.tensor(m.tensor).detach().abs().movedim(m.dim, 0)
            for i in range(len(group) if m.role in ("weight", "") else 0):
                size[i] += float(rows[list(m.index[i])].sum())
        assert len(kept) == len(group) / 2
        assert min(size[i] for i in kept) >= max(size[i] for i in range(len(group)) if i not in kept)
    deep = fw.distill.Student(width=1.0, depth=0.5).plan(net, fw.Task())
    small = deep.apply(net)
    assert len(deep.blocks) == 2
    assert len(small.calls(torch.ops.aten.conv2d.default)) < len(net.calls(torch.ops.aten.conv2d.default))
    fresh = fw.distill.Student(weights="fresh").plan(net, fw.Task())
    assert digest(fresh.apply(net)) == digest(fresh.apply(net))
    assert torch.equal(fresh.apply(net).tensor("stem.1.weight"), torch.ones(4))


@pytest.mark.parametrize("loss", ["attention", "cwd", "review", "fgd", "mgd", "hidden", "relations"])
def test_losses_over_places_leave_activations_without_places_alone(loss):
    torch.manual_seed(0)
    flat = fw.capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.zeros(2, 8))
    with pytest.raises(RecipeError, match=r"write Features\('hint'\)"):
        Features(loss, taps="layers").start(flat, fw.Task(), fw.steps.Context(original=flat))
    net = fw.capture(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)).eval(),
                     torch.zeros(2, 3, 8, 8))
    data = [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))]
    task = fw.Task(train=lambda: data, loss=nn.functional.cross_entropy)
    notes = Train(epochs=1, lr=0.01, beside=(Features(loss, taps="layers"),)).fit(
        net, task, fw.steps.Context(original=net)).notes
    assert any("leaves out 2: it has no places" in note for note in notes)
