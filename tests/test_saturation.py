"""Sums of two products of 8 bits: never cut off in 16 bits by what is planned, so that files are right without VNNI."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight import deploy
from featherweight.errors import RecipeError
from featherweight.numerics.saturation import factors, saturated
from featherweight.quantize import Quantize
from featherweight.steps import Context

torch.set_num_threads(1)


def kernel(weights: np.ndarray, given: np.ndarray, padded: bool) -> bool:
    """Whether ``vpmaddubsw`` saturates: one row of weights [window, channels] and of activations, in a loop."""
    if padded and weights.shape[1] % 2:
        weights, given = (np.pad(a, ((0, 0), (0, 1))) for a in (weights, given))
    w, u = weights.ravel().tolist(), given.ravel().tolist()
    w, u = w + [0] * (len(w) % 2), u + [0] * (len(u) % 2)
    sums = [w[i] * u[i] + w[i + 1] * u[i + 1] for i in range(0, len(w), 2)]
    return any(np.clip(s, -32768, 32767) != s for s in sums)


@pytest.mark.parametrize(("window", "channels"), [(1, 1), (1, 8), (9, 3), (9, 4), (4, 5)])
def test_saturated_is_what_the_instruction_does(window: int, channels: int) -> None:
    generator = np.random.default_rng(0)
    weights = generator.integers(-127, 128, (6, window, channels))
    given = generator.integers(0, 256, (40, window, channels))
    found = saturated(torch.tensor(weights), torch.tensor(given))
    assert found.any() or channels == 1
    for n in range(40):
        for r in range(6):
            assert bool(found[n, r]) == any(kernel(weights[r], given[n], padded) for padded in (False, True))


@pytest.mark.parametrize(("window", "channels"), [(1, 1), (1, 8), (9, 3), (9, 16)])
@pytest.mark.parametrize("top", [255, None])
def test_factors_are_enough_and_hardly_more(window: int, channels: int, top: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, window, channels, generator=generator, dtype=torch.float64)
    scale = weight.flatten(1).abs().amax(1) / 127
    largest = torch.randint(200, 256, (channels,), generator=generator) if top is None else torch.tensor([top])
    found = factors(weight / scale[:, None, None], largest)
    assert float(found.min()) == 1
    assert float(found.max()) <= 2

    def worst(scale: Tensor) -> Tensor:
        """Rows that saturate where the activations of all weights of one sign are as large as they get."""
        numbers = torch.round(weight / scale[:, None, None])
        ends = [((numbers * sign > 0) * largest)[:, None] for sign in (1, -1)]
        return torch.tensor([any(bool(saturated(numbers[r:r + 1], end[r]).any()) for end in ends) for r in range(32)])

    assert not worst(scale * found).any()
    grown = found > 1
    assert bool(grown.any()) is (channels > 1)
    assert worst(scale * torch.where(grown, found * 0.96, found))[grown].all()


class Mixed(nn.Module):
    """Convolutions of 3 colours, in groups, on negative values, a linear call: large weights meet large activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, 1, groups=2)
        self.c, self.d = nn.Conv2d(32, 16, 1), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        return self.d(self.c(x).flatten(2).transpose(1, 2))


class Up(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 6, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.a(x)))


def images() -> Tensor:
    return torch.rand(16, 3, 8, 8) * 4 - 1


PLANS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, str]]] = {
    "static": (Mixed, images, {}),
    "signed": (Mixed, images, {"activations": "int8"}),
    "gptq": (Mixed, images, {"rounding": "gptq"}),
    "one scale": (Mixed, images, {"granularity": "tensor"}),
    "transposed": (Up, images, {"target": "openvino"}),
    "dynamic": (lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), lambda: torch.randn(8, 64),
                {"activations": "dynamic"}),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_saturate_nowhere_on_calibration_data(name: str) -> None:
    torch.manual_seed(0)
    make, draw, options = PLANS[name]
    model, x = make().eval(), draw()
    with torch.no_grad():
        for parameter in model.parameters():  # pairs of large weights
            parameter[parameter.abs() < 0.5 * parameter.abs().max()] *= 0.1
            parameter.abs_()
    network = fw.capture(model, x[:2], parts=False)
    task = fw.Task(calibration=[(x, None)])
    cut, whole = (Quantize(device=d, **options).plan(network, task).apply(network) for d in ("vnni", "any"))
    assert deploy.saturating(cut, (x,)), "nothing to keep from saturating"
    assert deploy.saturating(whole, (x,)) == ()
    assert float((whole(x) - network(x)).detach().norm() / network(x).detach().norm()) < 0.03


class Normed(nn.Module):
    """A convolution that a batch norm turns around and scales, and a linear call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Linear(16, 8)
        nn.init.uniform_(self.b.weight, -1.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(self.a(x))).flatten(2).transpose(1, 2))


TRAINED = [("static", Mixed, "lsq"), ("normed", Normed, "lsq"), ("normed", Normed, "ste"), ("dynamic", Mixed, "lsq")]


@pytest.mark.parametrize(("name", "make", "learn"), TRAINED)
def test_what_was_trained_saturates_nowhere_on_calibration_data(name: str, make: Callable[[], nn.Module],
                                                                learn: str) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), images()
    with torch.no_grad():
        for layer in model.children():  # pairs of large weights
            if not isinstance(layer, nn.BatchNorm2d):
                layer.weight[layer.weight.abs() < 0.5 * layer.weight.abs().max()] *= 0.1
                layer.weight.abs_()
    network = fw.capture(model, x[:2], parts=False)
    wanted = network(x).detach()
    task = fw.Task(train=[(x, wanted)] * 8, calibration=[(x, None)], loss=F.mse_loss)
    found = []
    for device in ("vnni", "any"):
        step = Quantize(device=device, learn=learn, activations="dynamic" if name == "dynamic" else "uint8")
        made = fw.recover.Train(epochs=1, lr=1e-5, during=(step,)).fit(network, task, Context())
        found.append((deploy.saturating(made, (x,)), float((made(x) - wanted).norm().detach() / wanted.norm())))
    assert found[0][0], "nothing to keep from saturating"
    assert found[1][0] == ()
    assert found[1][1] < max(0.03, 2 * found[0][1])


def test_calls_that_saturate_are_those_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    x = images()
    network = fw.capture(Mixed().eval(), x[:2], parts=False)
    step = Quantize(device="vnni", mixed={"a": "int7"})
    cut = step.plan(network, fw.Task(calibration=[(x, None)])).apply(network)
    conv = cut.calls(torch.ops.aten.conv2d.default)[0]
    numbers = cut.tensor("a.weight").numpy()
    _, scale, zero, *_ = conv.args[0].args
    given = F.pad(torch.round(x / scale).clamp(-zero, 255 - zero), (1, 1, 1, 1)).int().numpy() + zero
    rows = [kernel(numbers[o].transpose(1, 2, 0).reshape(9, 3),
                   given[n, :, i:i + 3, j:j + 3].transpose(1, 2, 0).reshape(9, 3), padded)
            for n in range(2) for o in range(16) for i in range(8) for j in range(8) for padded in (False, True)]
    assert ("a" in deploy.saturating(cut, (x[:2],))) is any(rows) is False


def test_a_device_that_is_not_known_is_refused() -> None:
    with pytest.raises(RecipeError, match="did you mean 'vnni'"):
        Quantize(device="vnn").check()
