"""Quantization-aware training: gradients as plain autograd has them, the trained network is the one that is stored."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import featherweight as fw
from featherweight import deploy
from featherweight.demo.digits import digits
from featherweight.errors import RecipeError
from featherweight.numerics import grids
from featherweight.numerics.formats import GRIDS
from featherweight.numerics.grids import Spec
from featherweight.quantize import Quantize
from featherweight.quantize.training.learners import LEARNERS
from featherweight.quantize.training.quantizers import Fixed, Lsq, Pact, Steepening, steepening
from featherweight.quantize.training.weight_quantizers import Apot, Balanced, Dorefa, Straight, Ttq
from featherweight.recover import Train
from featherweight.steps import Context, Plan
from test_quantize import SHAPES, Attention, Concat, Mobile, Residual, prepared, relative_error

FORMS = [("int8", "uint8"), ("int4", "uint4"), ("int3", "uint3"), ("int2", "uint2"), ("ternary", "uint2"),
         ("binary", None), ("binary", "uint1"), ("int4", "int4"), ("apot3", "uint3"), ("apot4", "uint4"),
         ("int8", "dynamic")]


# ---- gradients: the same written with plain autograd

def passed(forward, backward):
    """The value of one, the gradient of the other."""
    return backward + (forward - backward).detach()


def nearest(steps, spec, zero=0):
    """Value by value, the number of the grid that is nearest to it."""
    if spec.odd:
        numbers = torch.arange(spec.lowest, spec.highest + 1, 2)
    elif spec.levels is not None:
        numbers = torch.tensor(sorted({*spec.levels, *(-v for v in spec.levels)}))
    else:
        numbers = torch.arange(spec.lowest, spec.highest + 1) - zero
    return numbers[(steps.detach()[..., None] - numbers).abs().argmin(-1)].to(steps.dtype)


def scaled(gradient_of, factor):
    return passed(gradient_of, gradient_of * factor)


def slow_lsq(x, size, spec, zero=0, values=False):
    low, high = spec.lowest - zero, spec.highest - zero
    count = x.numel() / size.numel()
    scale = scaled(size.abs(), (count * max(high, -low)) ** -0.5)
    steps = x / scale
    cut = steps.clamp(low, high)
    if spec.bits > 1:
        return passed(nearest(steps, spec, zero), cut) * scale
    numbers = nearest(steps, spec, zero)
    if not values:  # gradients pass everywhere to weights, to the scale as where there are more bits
        held = x.detach() / scale
        return passed(numbers, held.clamp(low, high)) * scale + (x - x.detach())
    middle, half = (low + high) / 2, (high - low) / 2
    away = ((steps - middle) / half).clamp(-1, 1)
    soft = half * (2 * away - away * away.abs())  # Bi-Real net's approximation of the step
    return passed(numbers, soft) * scale


@pytest.mark.parametrize(("spec", "zero", "values"), [
    (Spec(8), 0, False), (Spec(4), 0, False), (Spec(2), 0, False), (Spec(2, odd=True), 0, False),
    (Spec(1, odd=True), 0, False), (GRIDS["apot4"], 0, False),
    (Spec(4, False, False), 0, True), (Spec(4, False, False), 5, True), (Spec(8, False, False), 100, True),
    (Spec(1, False, False), 0, True), (Spec(1, False, False), 1, True), (Spec(3), 0, True)])
@pytest.mark.parametrize("sign", [1, -1])
def test_learned_scales_are_those_of_the_paper(spec, zero, values, sign):
    generator = torch.Generator().manual_seed(spec.bits)
    x = torch.randn(6, 40, generator=generator, dtype=torch.float32).requires_grad_()
    scale = torch.tensor(0.4) if values else torch.linspace(0.2, 0.6, 6)[:, None]
    quantizer = Lsq(spec, scale, zero, values)
    with torch.no_grad():
        quantizer.size.mul_(sign)
    weights = torch.randn(6, 40, generator=generator)
    made = quantizer(x)
    found = torch.autograd.grad((made * weights).sum(), (x, quantizer.size))
    size = quantizer.size.detach().clone().requires_grad_()
    slow = slow_lsq(x, size, spec, zero, values)
    wanted = torch.autograd.grad((slow * weights).sum(), (x, size))
    torch.testing.assert_close(made, slow)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_ends_of_pact_learn_from_what_is_cut_off_and_decay():
    x = torch.randn(8, 30, generator=torch.Generator().manual_seed(0)).requires_grad_()
    spec, zero = Spec(4, False, False), 3
    quantizer = Pact(spec, torch.tensor(0.1), zero)
    made = quantizer(x)
    made.square().sum().backward()
    end = torch.tensor(1.2, requires_grad=True)
    scale = (end / 12).detach()
    cut = torch.minimum(torch.maximum(x, -end * 3 / 12), end)
    slow = passed(nearest(x / scale, spec, zero) * scale, cut)
    wanted = torch.autograd.grad(slow.square().sum(), (x, end))
    torch.testing.assert_close(made, slow)
    torch.testing.assert_close((x.grad, quantizer.end.grad), wanted, rtol=1e-4, atol=1e-4)
    quantizer.after_backward()
    torch.testing.assert_close(quantizer.end.grad, wanted[1] + 2e-4 * 1.2, rtol=1e-4, atol=1e-4)


def gradient(quantizer, x):
    x = x.clone().requires_grad_()
    made = quantizer(x)
    weights = torch.linspace(-1, 2, x.numel()).view(x.shape)
    return made.detach(), torch.autograd.grad((made * weights).sum(), (x, *quantizer.own)), weights


def test_learners_of_weights_beside_plain_autograd():
    w = torch.randn(5, 60, generator=torch.Generator().manual_seed(1)) * 0.3 + 0.05
    scale, sign, ternary = torch.full((5, 1), 0.1), Spec(1, odd=True), Spec(2)
    made, found, weights = gradient(Straight(sign, scale), w)
    torch.testing.assert_close(made, torch.where(w >= 0, 1.0, -1.0) * w.abs().mean(1, keepdim=True))
    torch.testing.assert_close(found[0], weights)
    made, found, _ = gradient(Straight(Spec(4), scale), w)
    torch.testing.assert_close(made, (w / w.abs().amax(1, True) * 7).round() / 7 * w.abs().amax(1, True))
    made, found, weights = gradient(Dorefa(Spec(4), scale), w)
    torch.testing.assert_close(found[0], weights * (1 - torch.tanh(w).square()))
    torch.testing.assert_close(made, (w.tanh() / w.tanh().abs().max() * 7).round() * w.tanh().abs().max() / 7)
    quantizer = Ttq(ternary, scale)
    quantizer.begin(w)
    made, found, weights = gradient(quantizer, w)
    high, low = (s > 0.05 * w.abs().max() for s in (w, -w))
    up, down = w[high].mean(), -w[low].mean()
    torch.testing.assert_close(made, high * up - low * down, rtol=0.005, atol=0.0)
    assert len(made.unique()) == 3
    torch.testing.assert_close(found, (weights * (high * up + low * down + (~high & ~low)),
                                       (weights * high).sum(), -(weights * low).sum()), rtol=1e-4, atol=1e-3)


def test_signs_of_balanced_weights_have_a_gradient_that_narrows():
    w = (torch.randn(5, 60, generator=torch.Generator().manual_seed(1)) * 0.3 + 0.2).requires_grad_()
    quantizer = Balanced(Spec(1, odd=True), torch.full((5, 1), 0.25))
    for done in (0.0, 0.5, 1.0):
        quantizer.progress(done)
        t = 0.1 * 100**done
        centred = w - w.mean(1, keepdim=True)
        level = centred / centred.std(1, correction=0, keepdim=True)
        soft = torch.tanh(t * level) * max(1 / t, 1)
        slow = passed(torch.where(level >= 0, 1.0, -1.0), soft) * 0.25
        made = quantizer(w)
        torch.testing.assert_close(made, slow)
        found, wanted = (torch.autograd.grad(v.square().sum() + v.pow(3).sum(), w)[0] for v in (made, slow))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    x = torch.linspace(-3, 3, 400)
    widths = [float((steepening(0.0, 1.0, t)(x) > 0.5 * max(t, 1.0)).float().mean()) for t in (0.3, 1.0, 3.0, 10.0)]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.05
    values = Steepening(Spec(1, False, False), torch.tensor(0.5), values=True)
    values.progress(1.0)
    x = torch.linspace(-0.2, 0.7, 50).requires_grad_()
    given, = torch.autograd.grad(values(x).sum(), x)
    assert int(given.argmax()) == int((x - 0.25).abs().argmin())


def test_powers_of_two_are_learned_on_normalized_weights_and_zeros_stay():
    w = torch.randn(8, 40, generator=torch.Generator().manual_seed(0)) * 0.02 + 0.004
    w[:, :5] = 0
    spec = GRIDS["apot4"]
    scale, _ = grids.least_squares(w, dataclasses.replace(spec, axis=0))
    quantizer = Apot(spec, scale[:, None])
    quantizer.begin(w)
    made, found, weights = gradient(quantizer, w)
    assert (made[:, :5] == 0).all()
    for row, step in zip(made, quantizer.scale(w), strict=True):
        numbers = (row / step).round()
        assert set(numbers.abs().int().tolist()) <= set(spec.levels)
        torch.testing.assert_close(numbers * step, row)
    spread = w.std(correction=0)
    size = quantizer.size.detach().clone().requires_grad_()
    level = torch.where(w == 0, 0.0, (w - w.mean()) / spread)
    slow = slow_lsq(level, size, spec) * spread
    torch.testing.assert_close(made, slow.detach())
    torch.testing.assert_close(found[1], torch.autograd.grad((slow * weights).sum(), size)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [k for k, s in GRIDS.items() if s.levels])
def test_powers_of_two_are_sums_of_powers_of_two(kind):
    spec = GRIDS[kind]
    assert len(spec.levels) == 2 ** (spec.bits - 1)
    assert all(bin(level).count("1") <= (spec.bits // 2) for level in spec.levels)
    x = torch.linspace(-1.3, 1.3, 301) * spec.highest
    zero = torch.zeros((), dtype=torch.int32)
    numbers = grids.quantize(x, torch.tensor(1.0), zero, spec)
    torch.testing.assert_close(numbers.float(), nearest(x, spec))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_in_bfloat16_are_rounded_as_in_float32(bits):
    spec = Spec(bits, False, False)
    scale = torch.tensor(0.0371)
    x = (torch.rand(64, 50, generator=torch.Generator().manual_seed(0)) * scale * (spec.highest + 2)).bfloat16()
    half, whole = (Lsq(spec, scale, 0, values=True) for _ in range(2))
    made, want = half(x.requires_grad_()), whole(x.detach().float().requires_grad_())
    assert made.dtype == torch.bfloat16
    made.float().square().sum().backward()
    want.square().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert ((made.float() - want).abs() > 0.5 * scale).float().mean() < 0.05  # at ties alone
    torch.testing.assert_close(half.size.grad, whole.size.grad, rtol=0.03, atol=0.0)


# ---- the network that trained is the network that is stored

def signed(network):
    """Every third channel of each batch norm turned over."""
    for name, tensor in network.tensors().items():
        if "norm" in name and name.endswith("weight"):
            tensor.data[::3] *= -1
    return network


def driven(step, network, task, x, steps=1):
    """(what the training graph gives in evaluation mode, what its plan makes of the trained network)."""
    work = network.copy()
    driver = step.start(work, task)
    optimizer = torch.optim.SGD([*work.parameters(), *driver.parameters()], lr=0.01)
    work.train()
    for index in range(steps):
        driver.update(index / steps)
        work(x).square().mean().backward()
        driver.after_backward()
        optimizer.step()
        optimizer.zero_grad()
    driver.update(1.0)
    with torch.no_grad():
        want = work.eval()(x)
    plan = driver.finish()
    trained = network.copy()
    with torch.no_grad():
        for name, tensor in trained.tensors().items():
            tensor.copy_(work.tensor(name))
    return want, plan, plan.apply(trained)


@pytest.fixture
def in_double():
    """In float32, sums in another order round an activation between two steps the other way on some processors."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("model", [Residual, Mobile, Concat, Attention], ids=lambda c: c.__name__.lower())
@pytest.mark.parametrize(("weights", "activations"), FORMS)
def test_the_plan_gives_what_the_training_graph_gave(in_double, model, weights, activations):
    torch.manual_seed(0)
    network, task, x = prepared(model(), *SHAPES[model])
    signed(network)
    for learn in [name for name, learner in LEARNERS.items() if weights in learner.kinds]:
        for ends in (None, "int8/uint8") if learn in ("lsq", "ttq") and model is Residual else (None,):
            step = Quantize(weights=weights, activations=activations, learn=learn, ends=ends)
            want, plan, result = driven(step, network, task, x)
            assert want.dtype == torch.float64
            assert want.abs().max() > 1e-3
            assert relative_error(result(x), want) < 1e-4, (learn, ends)
            kinds = {s.kind for s in plan.stored}
            assert kinds <= {"int8" if learn == "ttq" else weights, "int8"}


@pytest.mark.parametrize("learn", ["lsq", "ste", "pact", "dorefa"])
def test_scales_per_tensor_and_transposed_layers(learn):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, groups=1), nn.BatchNorm2d(8), nn.ReLU(),
                          nn.ConvTranspose2d(8, 6, 2, 2, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
                          nn.ConvTranspose2d(6, 6, 2, 2, groups=2), nn.BatchNorm2d(6), nn.ReLU(),
                          nn.ConvTranspose2d(6, 4, 2, 2, groups=2))
    network, task, x = prepared(model, 3, 6, 6)
    for grain in ("channel", "tensor"):
        step = Quantize(weights="int4", activations="uint4", granularity=grain, learn=learn, ends=None)
        want, plan, result = driven(step, network, task, x)
        assert relative_error(result(x), want) < 1e-4
        assert [s.path for s in plan.skipped if "after its groups" in s.reason] == ["6.weight"]
        assert [s.weight for s in plan.stored] == ["0.weight", "3.weight", "9.weight"]


def test_halves_are_named_and_pruned_zeros_stay():
    network, task, x = prepared(Residual(), 3, 8, 8)
    weight = network.tensor("conv1.weight")
    with torch.no_grad():
        weight[:, ::2] = 0
    network.patterns["conv1.weight"] = "test"
    _, plan, result = driven(Quantize(weights="fp16", mixed={"conv1": "apot4"}, learn="apot"), network, task, x)
    assert {"stem.weight", "conv2.weight", "linear.weight"} <= {s.path for s in plan.skipped if "fp16 is not trained" in
                                                                s.reason}
    assert (result.tensor("conv1.weight")[:, ::2] == 0).all()
    assert result.patterns == network.patterns


def test_a_tied_weight_trains_on_one_grid():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.embed = nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(5, 8)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(F.relu(self.one(self.embed(x))))

    torch.manual_seed(0)
    x = torch.randint(0, 5, (4, 3))
    network = fw.capture(Twice().eval(), x)
    task = fw.Task(calibration=lambda: [(x, None)])
    want, plan, result = driven(Quantize(weights="int4", activations="uint4", ends=None), network, task, x)
    assert relative_error(result(x), want) < 1e-4
    assert len(plan.stored) == 2
    assert result.tensor("one.weight") is result.tensor("two.weight")


def test_eight_bits_run_in_onnx_runtime_as_they_were_trained(tmp_path):
    network, task, x = prepared(Residual(), *SHAPES[Residual])
    want, _, result = driven(Quantize(), network, task, x)
    target = deploy.target("onnxruntime")
    target.export(result, tmp_path / "m.onnx")
    runner = target.load(tmp_path / "m.onnx", like=result.signature)
    assert deploy.verify(result, runner, (x,)).ok
    assert relative_error(runner(x), want) < 0.02


def test_few_levels_are_packed_in_few_bits(tmp_path):
    network, task, x = prepared(nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)), 128)
    sizes = {}
    for weights, learn in (("int8", "lsq"), ("apot4", "apot"), ("ternary", "ttq"), ("apot3", "lsq")):
        _, _, result = driven(Quantize(weights=weights, activations=None, learn=learn, ends=None), network, task, x)
        sizes[weights] = result.save(tmp_path / "n.fw")
        assert torch.equal(fw.load(tmp_path / "n.fw")(x), result(x))
    rest = sizes["int8"] - 65536
    for weights, bits in (("apot4", 4), ("apot3", 3), ("ternary", 2)):
        assert sizes[weights] < rest + 65536 * bits / 8 + 500


# ---- in a training

@functools.cache
def trained_digits():
    """A small network that tells digits apart, and the task."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
                          nn.Conv2d(12, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                          nn.Conv2d(16, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                          nn.Flatten(), nn.Linear(64, 10))
    data = digits()

    def train():
        x, y = data["train"]
        order = torch.randperm(len(x))
        return [(x[i], y[i]) for i in order.split(64)]

    task = fw.Task(train=train, calibration=lambda: [data["calibration"]], loss=F.cross_entropy)
    network = fw.capture(model.eval(), torch.zeros(2, 1, 8, 8))
    return Train(epochs=8, lr=0.1).fit(network, task, Context()), task


def missed(network):
    """Cross entropy and share of errors on images that were not trained on."""
    x, y = digits()["validation"]
    with torch.no_grad():
        given = network(x)
    return float(F.cross_entropy(given, y)), float((given.argmax(1) != y).float().mean())


@functools.cache
def at_two_bits(learn, **more):
    network, task = trained_digits()
    step = Quantize(weights="int2", activations="uint2", learn=learn, ends=None, **more)
    return missed(Train(epochs=4, lr=0.02, during=(step,)).fit(network, task, Context()))


def test_learned_scales_beat_fixed_ones_and_both_beat_rounding_afterwards():
    network, task = trained_digits()
    two = Quantize(weights="int2", activations="uint2", ends=None, correct_bias=False)
    after = missed(two.plan(network, task).apply(network))
    fixed = at_two_bits("ste", ranges="minmax")
    learned = at_two_bits("lsq")
    assert learned[0] < 0.85 * fixed[0] < 0.85 * 0.5 * after[0]
    assert learned[1] < fixed[1] < 0.5 * after[1]
    assert learned[1] < missed(network)[1] + 0.05


class Killed(Exception):
    pass


def killer(at):
    calls = [0]

    def loss(output, target):
        calls[0] += 1
        if calls[0] == at:
            raise Killed("now")
        return F.cross_entropy(output, target)

    return loss


@pytest.mark.filterwarnings("ignore:autocast='bf16' on a processor that emulates bfloat16:UserWarning")
@pytest.mark.parametrize("step", [
    Quantize(weights="int4", activations="uint4"), Quantize(weights="int4", activations="uint4", learn="pact"),
    Quantize(weights="int3", activations="uint3", progressive=("int8/uint8", "int5/uint5")),
    Quantize(weights="int2", activations="uint4", learn="ste", progressive=("int4",), ends=None),
    Quantize(weights="binary", activations="uint1", learn="balanced")], ids=lambda s: s.learn)
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(step, tmp_path):
    network, task = trained_digits()
    before = {k: v.clone() for k, v in network.tensors().items()}
    train = Train(epochs=2, batches=4, lr=0.02, autocast="bf16", channels_last=True, during=(step,),
                  checkpoint_every=0.0)
    whole = train.fit(network, task, Context(workdir=tmp_path / "whole"))
    assert all(torch.equal(before[k], v) for k, v in network.tensors().items())
    with pytest.raises(Killed, match="now"):
        train.fit(network, dataclasses.replace(task, loss=killer(6)), Context(workdir=tmp_path / "killed"))
    told = []
    resumed = train.fit(network, task, Context(workdir=tmp_path / "killed", progress=lambda *a: told.append(a)))
    assert told[0][1] == 6
    one, other = whole.tensors(), resumed.tensors()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    plans = [Plan.load(tmp_path / run / "during_0.plan") for run in ("whole", "killed")]
    assert plans[0] == plans[1]


def test_fewer_bits_step_by_step():
    network, task, x = prepared(Residual(), 3, 8, 8)
    step = Quantize(weights="int2", activations="uint2", progressive=("int8/uint8", "int4/uint4"))
    work = network.copy()
    driver = step.start(work, task)
    bits, errors = [], []
    for progress in (0.0, 0.3, 0.34, 0.6, 0.7, 1.0):
        driver.update(progress)
        bits.append((driver.weights["conv1.weight"].spec.bits, driver.weights["stem.weight"].spec.bits,
                     {q.spec.bits for name, q in driver.values.items() if "relu" in name}))
        errors.append(relative_error(work(x), network(x)))
    assert [b[0] for b in bits] == [8, 8, 4, 4, 2, 2]
    assert {b[1] for b in bits} == {8}
    assert [2 in b[2] for b in bits] == [False, False, False, False, True, True]
    assert errors[0] < 0.1 < errors[-1]
    assert errors[0] <= errors[2] <= errors[4]
    weight = driver.weights["conv1.weight"]
    chosen = grids.least_squares(network.tensor("conv1.weight").detach(), Spec(2, odd=True, axis=0))[0]
    torch.testing.assert_close(weight.size.detach().flatten(), chosen)
    want = work(x)
    result = driver.finish().apply(network)
    assert relative_error(result(x), want) < 1e-4
    done, _, again = driven(step, network, task, x, steps=6)
    assert relative_error(again(x), done) < 1e-4


# ---- options

@pytest.mark.parametrize(("step", "message"), [
    (Quantize(learn="lsqq"), "expected one of 'lsq'"), (Quantize(learn="apot"), "write weights='apot5'"),
    (Quantize(learn="ttq"), "write weights='ternary', or learn='lsq'"),
    (Quantize(rounding="gptq"), r"rounding='gptq' .* after Train"), (Quantize(equalize=True), "equalize=True"),
    (Quantize(smooth=0.5), r"smooth=0\.5"), (Quantize(correct_bias=True), "correct_bias=True"),
    (Quantize(granularity=4), "granularity=4 cannot be used during training"),
    (Quantize(progressive=("fp16",)), "'fp16' is no form to train"),
    (Quantize(progressive=("int8/uint9",)), "'int8/uint9' is no form to train"),
    (Quantize(weights="binary", learn="balanced", progressive=("int8",)), "leave out progressive")])
def test_senseless_options_are_refused(step, message):
    network, task, _ = prepared(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), 8)
    with pytest.raises(RecipeError, match=message):
        step.start(network, task)


def test_a_fixed_grid_stays():
    x = torch.randn(4, 8).requires_grad_()
    fixed = Fixed(Spec(4, False, False), torch.tensor(0.1), 4, values=True)
    given, = torch.autograd.grad(fixed(x).sum(), x)
    torch.testing.assert_close(given, ((x > -0.4) & (x < 1.1)).float())
    assert not fixed.own
