"""Weights that a model computes from parameters are stored at capture, so that every technique treats them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.prune as masks
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import featherweight as fw
from featherweight.steps import Context

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")


class Lora(nn.Module):
    """A linear layer with a low-rank term beside its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 8) * 0.3), nn.Parameter(torch.randn(12) * 0.1)
        self.up, self.down = nn.Parameter(torch.randn(12, 2) * 0.3), nn.Parameter(torch.randn(2, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight + self.up @ self.down, self.bias)


def masked() -> nn.Module:
    layer = nn.Linear(8, 12)
    masks.l1_unstructured(layer, "weight", 0.5)
    return layer


def old_spectral() -> nn.Module:
    layer = nn.utils.spectral_norm(nn.Linear(8, 12))
    layer(torch.randn(2, 8))  # u and v are found while it trains
    return layer


#: name -> the layer whose weight [12, 8] is computed
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(8, 12)),
    "weight_norm, old": lambda: nn.utils.weight_norm(nn.Linear(8, 12)),  # type: ignore[deprecated]
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 12)),
    "spectral_norm, old": old_spectral,
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(8, 12)),
    "mask": masked,
    "low-rank term": Lora,
}
STEPS: dict[str, Callable[[], fw.prune.Weights | fw.prune.Channels | fw.quantize.Quantize]] = {
    "weights": lambda: fw.prune.Weights(sparsity=0.7),
    "channels": lambda: fw.prune.Channels(ratio=0.5),
    "int8": lambda: fw.quantize.Quantize(activations=None),
}


@functools.cache
def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(LAYERS[name](), nn.ReLU(), nn.Linear(12, 4)).eval()


@functools.cache
def captured(name: str) -> fw.Network:
    found = fw.capture(model(name), torch.randn(2, 8), parts=False)
    assert isinstance(found, fw.Network)
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_the_weight_is_stored_under_its_plain_name(name: str) -> None:
    net = captured(name)
    assert set(net.tensors()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert any("0.weight" in note and "keep_parametrizations=True" in note for note in net.notes)
    x = torch.randn(5, 8)
    torch.testing.assert_close(net(x), model(name)(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_family_treats_it(name: str, step: str) -> None:
    net = captured(name)
    plan = STEPS[step]().plan(net, fw.Task())
    assert "0.weight" in plan.to_json()
    assert not any(s.path.startswith("0") for s in plan.skipped)
    changed, same = plan.apply(net), torch.randn(3, 8)
    assert not torch.equal(changed(same), net(same))


def test_zeros_of_a_mask_are_kept_in_training() -> None:
    net = captured("mask")
    assert net.patterns == {"0.weight": "single"}
    task = fw.Task(train=lambda: [(torch.randn(16, 8), torch.randn(16, 4))] * 5, loss=nn.functional.mse_loss)
    trained = fw.recover.Train(lr=0.1).fit(net, task, Context())
    zeros = net.tensor("0.weight") == 0
    assert int(zeros.sum()) == 48
    assert bool((trained.tensor("0.weight")[zeros] == 0).all())
    assert not torch.equal(trained.tensor("0.weight"), net.tensor("0.weight"))


@pytest.mark.parametrize("name", LAYERS)
def test_parametrizations_can_be_kept(name: str) -> None:
    net = fw.capture(model(name), torch.randn(2, 8), parts=False, keep_parametrizations=True)
    names = {n for n, _ in model(name).named_parameters()}
    assert names <= set(net.tensors())
    assert not any("keep_parametrizations" in note for note in net.notes)
    plan = fw.prune.Channels(macs=0.6).plan(net, fw.Task())
    assert plan.macs_after == fw.measure.macs(plan.apply(net)).total


class Gained(nn.Module):
    """A linear layer whose rows are multiplied with gains, on either side; half of the gains are next to nothing."""

    def __init__(self, left: bool) -> None:
        super().__init__()
        self.weight, self.left = nn.Parameter(torch.randn(12, 8)), left
        self.register_buffer("gain", torch.ones(12, 8))
        self.gain[6:] = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.gain * self.weight if self.left else self.weight * self.gain)


@pytest.mark.parametrize("score", ["l1", "l2", "bn", "fpgm"])
@pytest.mark.parametrize("left", [True, False])
def test_weights_that_stay_computed_are_scored_as_calls_compute_with_them(score: str, left: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Gained(left), nn.ReLU(), masked_all(nn.Linear(12, 4))).eval()
    with torch.no_grad():
        net[2].weight_orig[:, 6:] *= 1e-3
    nets = [fw.capture(net, torch.randn(2, 8), keep_parametrizations=keep) for keep in (False, True)]
    kept = [fw.prune.Channels(ratio=0.5, score=score).plan(one, fw.Task()).keep for one in nets]
    assert kept == [{"0": tuple(range(6))}] * 2


def masked_all(layer: nn.Module) -> nn.Module:
    masks.identity(layer, "weight")
    return layer


def test_a_parameter_that_serves_something_else_too_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.g = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.rand(8, 1))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(nn.functional.linear(x, self.w * self.g).relu(), self.w)

    net = fw.capture(Shared().eval(), torch.randn(2, 8), parts=False)
    assert set(net.tensors()) == {"w", "g"}


def test_a_weight_larger_than_what_it_is_computed_from_stays_computed() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(12, 2)), nn.Parameter(torch.randn(2, 8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.up @ self.down)

    network = fw.capture(Product(), torch.randn(3, 8))
    assert set(network.tensors()) == {"up", "down"}
    assert not network.notes


def test_a_weight_that_is_only_moved_stays_the_parameter_it_is() -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 6))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.w.t().contiguous())

    net = fw.capture(Moved().eval(), torch.randn(2, 8), parts=False)
    assert set(net.tensors()) == {"w"}
    assert net.tensor("w").shape == (8, 6)
