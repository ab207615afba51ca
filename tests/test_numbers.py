"""Numbers at the edge of what types and runtimes hold: the deployed file stays right, or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import featherweight as fw
from featherweight import deploy
from featherweight.errors import ExportError, TaskError
from featherweight.numerics.grids import Spec, fake_quantize, least_squares, minmax
from featherweight.steps import Skipped

torch.set_num_threads(1)


class Dead(nn.Module):
    """One channel of a normalized convolution is scaled by next to nothing, and has a bias."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.c, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.d, self.f = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)
        with torch.no_grad():
            self.b.weight[3], self.b.bias[3] = gain, 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.f(F.relu(self.d(F.relu(self.b(self.c(x))))).mean((2, 3)))


def tiny_row() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
    with torch.no_grad():
        model[0].weight[3] *= 1e-9
        model[0].bias[3] = 3.0
    return model


def tiny_weights() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 5))
    with torch.no_grad():
        model[0].weight *= 1e-9
        model[0].bias[:] = torch.tensor([5.0, -4.5])
    return model


def images() -> Tensor:
    return torch.randn(8, 3, 12, 12)


BESIDE_BIAS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "gain 1e-5": (lambda: Dead(1e-5), images), "gain 1e-6": (lambda: Dead(1e-6), images),
    "gain 1e-9": (lambda: Dead(1e-9), images), "all weights": (tiny_weights, images),
    "a row of a linear layer": (tiny_row, lambda: torch.randn(32, 16)),
}


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("name", BESIDE_BIAS)
def test_tiny_weights_beside_a_bias_leave_the_file_right(name: str, granularity: str, tmp_path) -> None:
    torch.manual_seed(0)
    model, x = BESIDE_BIAS[name][0]().eval(), BESIDE_BIAS[name][1]()
    net = fw.capture(model, x, parts=False)
    step = fw.quantize.Quantize(granularity=granularity)
    rounded = step.plan(net, fw.Task(calibration=[(x, None)])).apply(net)
    target = deploy.target("onnxruntime")
    target.export(rounded, tmp_path / "net.onnx")
    runner = target.load(tmp_path / "net.onnx", like=rounded.signature)
    found, whole = deploy.verify(rounded, runner, (x,)), net(x).detach()
    assert found.ok, found
    assert float((runner(x) - whole).norm() / whole.norm()) < 0.02


@pytest.mark.parametrize("choose", [minmax, least_squares])
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_channel_of_zeros_stays_next_to_zero_where_zero_is_no_level(bits: int, choose) -> None:
    spec = Spec(bits, odd=True, axis=0)
    weight = torch.stack([torch.randn(50), torch.zeros(50)])
    scale, zero = choose(weight, spec)
    rounded = fake_quantize(weight, scale, zero, spec)
    assert float(rounded[1].abs().max()) < 1e-20
    assert float(rounded[0].abs().min()) > 1e-3


class Broken:
    """A runner whose file gives what the network gives, NaN where it does."""

    precision, exact_sums, versions = "f32", True, {}

    def __init__(self, network: fw.Network) -> None:
        self.network = network

    def __call__(self, x: Tensor) -> Tensor:
        return self.network(x).detach()


def test_nan_on_both_sides_is_no_agreement() -> None:
    net = fw.capture(nn.Linear(4, 3), torch.randn(2, 4), parts=False)
    with torch.no_grad():
        net.tensor("weight")[0] = torch.inf
        net.tensor("bias")[0] = -torch.inf
    found = deploy.verify(net, Broken(net), (torch.ones(2, 4),))
    assert not found.ok
    assert "not finite" in found.complaint()


@pytest.mark.parametrize(("saturates", "told"), [(False, False), (True, True)])
def test_advice_on_saturation_is_given_only_where_sums_may_saturate(saturates: bool, told: bool) -> None:
    said = deploy.Agreement(1.0, 0.4, False, 0.05, saturates).complaint()
    assert ("VNNI" in said) is told


class Calls(nn.Module):
    """A forward function over a few named parts."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def pooled(padding: int = 1, **options: bool) -> Callable[[], nn.Module]:
    return lambda: Calls(lambda m, x: m.b(F.avg_pool2d(m.a(x), 3, 2, padding, **options)),
                         a=nn.Conv2d(3, 16, 3, padding=1), b=nn.Conv2d(16, 4, 3))


def same() -> nn.Module:
    """Padded as TensorFlow does it."""
    parts: list[nn.Module] = []
    for channels in (3, 16, 16):
        parts += [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, 16, 3, 2), nn.ReLU6()]
    return nn.Sequential(*parts)


def padded_for_several(m: nn.Module, x: Tensor) -> Tensor:
    p = F.pad(F.relu(m.a(x)) - 0.3, (1, 1, 1, 1))
    return m.b(p) + F.max_pool2d(m.c(p), 1) + F.max_pool2d(p, 3, 1)[:, :4]


def siamese(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x)) - F.relu(m.a(x * 0.5)))


def parts() -> dict[str, nn.Module]:
    return {"a": nn.Conv2d(3, 16, 3, padding=1), "b": nn.Conv2d(16, 4, 3), "c": nn.Conv2d(16, 4, 3)}


#: what runtimes compute wrongly or slowly in the plain form: zeros around pools and convolutions, weights read twice
AROUND: dict[str, Callable[[], nn.Module]] = {
    "average over zeros": pooled(), "average without them": pooled(count_include_pad=False),
    "windows cut off": pooled(ceil_mode=True), "windows cut off, no zeros": pooled(ceil_mode=True, padding=0),
    "same": same, "several readers": lambda: Calls(padded_for_several, **parts()),
    "siamese": lambda: Calls(siamese, **parts()),
    "stride of one": lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1, 2, 1)),
}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", AROUND)
def test_what_lies_around_is_zero_in_every_runtime(name: str, target: str, tmp_path) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    torch.manual_seed(0)
    model, x = AROUND[name]().eval(), torch.randn(8, 3, 12, 12)
    net, runtime = fw.capture(model, x, parts=False), deploy.target(target)
    path = tmp_path / f"net{runtime.suffix}"
    step = fw.quantize.Quantize(target=target)
    for network in (net, step.plan(net, fw.Task(calibration=[(x, None)])).apply(net)):
        runtime.export(network, path)
        found = runtime.load(path, like=net.signature)(x)
        wanted, whole = network(x).detach(), net(x).detach()
        assert float((found - wanted).norm() / wanted.norm()) < 0.01
        assert float((found - whole).norm() / whole.norm()) < 0.03


def shared_linear(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x))) + m.b(F.relu(m.a(x * 0.5)))


def linear_parts() -> dict[str, nn.Module]:
    return {"a": nn.Linear(16, 32), "b": nn.Linear(32, 4)}


@pytest.mark.parametrize("activations", ["uint8", "dynamic"])
@pytest.mark.parametrize("convolution", [True, False])
def test_weights_of_several_calls_load_in_sessions_with_exact_sums(convolution: bool, activations: str,
                                                                   tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = Calls(siamese, **parts()) if convolution else Calls(shared_linear, **linear_parts())
    x = torch.randn(8, 3, 12, 12) if convolution else torch.randn(8, 16)
    net = fw.capture(model.eval(), x, parts=False)
    step = fw.quantize.Quantize(activations=activations)
    small = step.plan(net, fw.Task(calibration=[(x, None)])).apply(net)
    size = deploy.target("onnxruntime").export(small, tmp_path / "net.onnx")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), options)
    found, wanted = torch.tensor(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), small(x).detach()
    assert float((found - wanted).norm() / wanted.norm()) < 0.01
    assert size < sum(p.numel() for p in model.parameters()) + 5000, "a weight lies in the file once"


def apart(times: float) -> nn.Module:
    """Channels of a cat that are ``times`` apart, and weights that make up for it."""
    model = Calls(lambda m, x: m.b(torch.cat([F.relu(m.a(x)), F.relu(m.c(x))], 1)), a=nn.Conv2d(3, 16, 3, padding=1),
                  c=nn.Conv2d(3, 16, 3, padding=1), b=nn.Conv2d(32, 8, 3))
    with torch.no_grad():
        for tensor in (model.a.weight, model.a.bias):
            tensor *= times
        model.b.weight[:, :16] /= times
    return model.eval()


@pytest.mark.parametrize(("times", "evened"), [(1.0, False), (4.0, False), (300.0, True)])
def test_channels_far_apart_are_equalized_unless_that_is_switched_off(times: float, evened: bool) -> None:
    torch.manual_seed(0)
    model, x = apart(times), torch.randn(8, 3, 12, 12)
    net, task = fw.capture(model, x, parts=False), fw.Task(calibration=[(x, None)])
    plans = {e: fw.quantize.Quantize(equalize=e).plan(net, task) for e in (None, False, True)}
    whole = net(x).detach()
    error = {e: float((p.apply(net)(x) - whole).norm() / whole.norm()) for e, p in plans.items()}
    assert error[None] == error[evened]
    assert error[None] < 0.05
    assert (error[False] > 0.5) is evened


class Summary(nn.Module):
    """A summary token beside others, ``times`` as large as it, mixed by residual steps; the summary is read alone."""

    def __init__(self, times: float) -> None:
        super().__init__()
        self.times, self.summary, self.head = times, nn.Parameter(torch.randn(1, 16, 1) * 0.1), nn.Linear(16, 5)
        self.lift, self.a, self.b = nn.Conv1d(8, 16, 1), nn.Conv1d(16, 16, 1), nn.Conv1d(16, 16, 1)
        for parameter in (*self.a.parameters(), *self.b.parameters()):
            nn.init.normal_(parameter, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.summary.expand(len(x), -1, -1), self.lift(x) * self.times], 2)
        x = x + self.a(x)
        x = x + self.b(x)
        return self.head(x[:, :, 0])


@pytest.mark.parametrize(("times", "apart"), [(0.3, False), (100.0, True)])
@pytest.mark.parametrize("trained", [True, False])
def test_sums_stay_float_where_a_part_read_alone_is_next_to_nothing_beside_the_rest(times: float, apart: bool,
                                                                                    trained: bool) -> None:
    torch.manual_seed(0)
    model, x = Summary(times).eval(), torch.randn(8, 8, 6)
    net = fw.capture(model, x, parts=False)
    wanted = net(x).detach()
    step, task = fw.quantize.Quantize(), fw.Task(train=[(x, wanted)], calibration=[(x, None)], loss=F.mse_loss)
    plan = step.start(net.copy(), task).finish() if trained else step.plan(net, task)
    assert any("read alone" in s.reason for s in plan.skipped) is apart
    assert float((plan.apply(net)(x) - wanted).detach().norm() / wanted.norm()) < 0.05


# ---- what is not finite, and what has no kernel

class Folded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.d, self.f = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(F.relu(self.d(F.relu(self.b(self.c(x))))).flatten(1))


def folded(**weights: float) -> fw.Network:
    torch.manual_seed(0)
    model = Folded().eval()
    with torch.no_grad():
        for name, value in weights.items():
            getattr(model, name).weight[0] = value
    return fw.capture(model, torch.randn(2, 3, 8, 8))


READERS = {"static": {}, "biases": {"activations": None, "correct_bias": True},
           "smoothed": {"activations": "dynamic", "smooth": 0.5},
           **{rounding: {"weights": "int4", "activations": None, "ends": None, "rounding": rounding}
              for rounding in ("gptq", "adaround", "blocks")}}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", READERS)
def test_data_that_are_not_finite_are_refused(options: str, number: float) -> None:
    data = torch.randn(4, 3, 8, 8)
    data[0, 0, 0, 0] = number
    step = fw.quantize.Quantize(**READERS[options])
    with pytest.raises(TaskError, match="look at that data"):
        step.plan(folded(), fw.Task(calibration=[(data, None)]))


def test_a_weight_that_is_not_finite_is_named() -> None:
    data = fw.Task(calibration=[(torch.randn(4, 3, 8, 8), None)])
    with pytest.raises(TaskError, match=r"'d\.weight' holds numbers that are not finite"):
        fw.quantize.Quantize().plan(folded(d=float("nan")), data)
    plan = fw.quantize.Quantize(activations=None).plan(folded(d=float("nan")), data)
    assert Skipped("d.weight", "its weight is empty or not finite") in plan.skipped


def test_halves_say_that_activations_are_rounded() -> None:
    data = fw.Task(calibration=[(torch.randn(4, 3, 8, 8), None)])
    plan = fw.quantize.Quantize(weights="fp16").plan(folded(), data)
    assert any("write Quantize(weights='fp16', activations=None)" in s.reason for s in plan.skipped)
    alone = fw.quantize.Quantize(weights="fp16", activations=None).plan(folded(), data)
    assert not any("for halves alone" in s.reason for s in alone.skipped)


def test_float64_without_a_kernel_is_refused_before_a_file_is_written(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    runtime, path = deploy.target("onnxruntime"), tmp_path / "n.onnx"
    with pytest.raises(ExportError, match=r"Conv \(.*\) in float64.*model.float\(\)"):
        runtime.export(fw.capture(Folded().double().eval(), x), path)
    assert not path.exists()
    network = fw.capture(nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Softmax(-1)).double().eval(), x)
    runtime.export(network, path)
    assert deploy.verify(network, runtime.load(path, like=network.signature), (x,)).ok


def test_complex_buffers_are_saved(tmp_path) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.register_buffer("turn", torch.randn(4, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (self.a(x) * self.turn).abs()

    network, x = fw.capture(Turned().eval(), torch.randn(2, 4)), torch.randn(3, 4)
    network.save(tmp_path / "n.fw")
    assert torch.equal(fw.load(tmp_path / "n.fw")(x), network(x))


# ---- halves end at 65504
def test_weights_beyond_halves_stay_as_they_are_and_are_named() -> None:
    """fp16 would make them infinite; bf16 reaches as far as floats."""
    torch.manual_seed(0)
    model, x = Folded().eval(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model.d.weight[2] *= 1e7
    network = fw.capture(model, x)
    plan = fw.quantize.Quantize("fp16", None).plan(network, fw.Task())
    assert [s.reason for s in plan.skipped if s.path == "d.weight"] == [
        f"its weights reach {float(network.tensor('d.weight').detach().abs().max()):.3g}, and fp16 ends at 65504; "
        'write mixed={"d.weight": "bf16"}']
    assert plan.apply(network).tensor("d.weight").dtype == torch.float32
    half = fw.quantize.Quantize("fp16", None, mixed={"d.weight": "bf16"}).plan(network, fw.Task()).apply(network)
    assert half.tensor("d.weight").dtype == torch.bfloat16
    wanted = network(x).detach()
    assert float((half(x).detach() - wanted).norm() / wanted.norm()) < 5e-3


def test_a_network_that_gives_no_numbers_agrees_with_no_file(tmp_path) -> None:
    network = folded(d=float("nan"))
    target = deploy.target("onnxruntime")
    target.export(network, tmp_path / "net.onnx")
    found = deploy.verify(network, target.load(tmp_path / "net.onnx", like=network.signature),
                          (torch.randn(4, 3, 8, 8),))
    assert not found.ok
    assert "not finite" in found.complaint()


# ---- a detector
def block(given: int, made: int, stride: int = 1, size: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(given, made, size, stride, size // 2, bias=False), nn.BatchNorm2d(made), nn.ReLU())


class Detector(nn.Module):
    """Two levels, the coarse one enlarged and added to the fine one; classes and boxes of every place."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(block(3, 16, 2), block(16, 32, 2), block(32, 64, 2), block(64, 64))
        self.coarse = nn.Sequential(block(64, 96, 2), block(96, 96))
        self.left, self.top, self.mix = block(64, 32, size=1), block(96, 32, size=1), block(32, 32)
        self.classes, self.boxes = nn.Conv2d(32, 3, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(x)
        mixed = self.mix(self.left(fine) + F.interpolate(self.top(self.coarse(fine)), scale_factor=2.0))
        return self.classes(mixed), F.relu(self.boxes(mixed))


def detector(images: int, size: int) -> tuple[fw.Network, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(images, 3, size, size)
    return fw.capture(Detector().eval(), x[:2]), x


def test_a_plan_computes_as_much_as_some_twenty_passes_over_the_data() -> None:
    """A detector of 350 pixels was still without a plan after six minutes; what a plan computes is counted here."""
    step = fw.prune.Channels(macs=1 / 1.3, score="reconstruction", allocation="sensitivity",
                             compensate="least_squares")
    network, x = detector(64, 64)
    with FlopCounterMode(display=False) as once, torch.no_grad():
        network(x)
    with FlopCounterMode(display=False) as counted:
        step.plan(network, fw.Task(calibration=[(part, None) for part in x.split(16)]))
    passes = counted.get_total_flops() / once.get_total_flops()
    assert 1 < passes < 30, passes


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_a_detector_in_int8_agrees_with_its_file(runtime: str, tmp_path) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    network, x = detector(4, 96)
    rounded = fw.quantize.Quantize().plan(network, fw.Task(calibration=[(x, None)])).apply(network)
    target = deploy.target(runtime)
    path = tmp_path / f"net{target.suffix}"
    target.export(rounded, path)
    runner = target.load(path, like=rounded.signature)
    assert (found := deploy.verify(rounded, runner, (x,))).ok, found
    for got, wanted in zip(runner(x), network(x), strict=True):
        assert float((got - wanted.detach()).norm() / wanted.detach().norm()) < 0.05
