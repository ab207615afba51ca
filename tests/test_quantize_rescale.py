"""Rescaling: products put in where the channels of a rounded value are too different for one grid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import featherweight as fw
from featherweight import deploy
from featherweight.balance import Ladder
from featherweight.demo import digits
from featherweight.errors import PlanError, TaskError
from featherweight.network import fold_batch_norm
from featherweight.quantize import Quantize
from featherweight.quantize.prepare import rescale
from featherweight.quantize.prepare.expand_activations import write_out
from featherweight.steps import Plan
from test_quantize import fitted, prepared, relative_error
from test_quantize_prepare import NETWORKS, images

aten = torch.ops.aten


class Swish(nn.Module):
    """Inverted residuals with SiLU; scales of batch norms between 2^-5 and 2^5."""

    def __init__(self, inputs=1, width=12):
        super().__init__()
        wide = 3 * width
        self.stem, self.stem_norm = nn.Conv2d(inputs, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.up, self.up_norm = nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.deep, self.deep_norm = nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False), nn.BatchNorm2d(wide)
        self.down, self.down_norm = nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width)
        self.last, self.last_norm = nn.Conv2d(width, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.head = nn.Linear(24, 10)

    def spread(self):
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.copy_(2 ** torch.empty_like(module.weight).uniform_(-5, 5))
        return self

    def forward(self, x):
        x = F.silu(self.stem_norm(self.stem(x)))
        y = F.silu(self.up_norm(self.up(x)))
        x = x + self.down_norm(self.down(F.silu(self.deep_norm(self.deep(y)))))
        return self.head(F.silu(self.last_norm(self.last(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def wrecked():
    """A network trained on digits whose channels are badly scaled, and its task."""
    task = digits.task()
    torch.manual_seed(0)
    model = Swish().spread()
    fitted(model, task, torch.optim.Adam(model.parameters(), 5e-3), epochs=10)
    return fw.capture(model, torch.zeros(2, 1, 8, 8)), task


def products_alone(plan, network):
    """The folded network with nothing but the plan's products and the tensors that go with them."""
    made = fold_batch_norm(network)
    write_out(made, plan.gates)
    for product in plan.products:
        rescale.multiply(made, product, plan.tensors[product.factor])
    for name in plan.changed:
        made.set_tensor(name, plan.tensors[name])
    return made.eval()


def test_what_plain_quantization_wrecks_is_nearly_whole_again(wrecked, tmp_path):
    network, task = wrecked
    x = images(task)
    plain, plan = (Quantize(rescale=r, correct_bias=False).plan(network, task) for r in (False, True))
    assert relative_error(plain.apply(network)(x), network(x)) > 0.4
    made = plan.apply(network)
    assert relative_error(made(x), network(x)) < 0.1
    assert relative_error(products_alone(plan, network)(x), network(x)) < 1e-5
    assert len(plan.stored) == len(plain.stored)
    plan.save(tmp_path / "plan")
    assert torch.equal(Plan.load(tmp_path / "plan").apply(network)(x), made(x))
    made.save(tmp_path / "net.fw")
    assert torch.equal(fw.load(tmp_path / "net.fw")(x), made(x))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_deployed_file_computes_the_same(wrecked, tmp_path, runtime):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    network, task = wrecked
    x = images(task)[:32]
    made = Quantize(rescale=True, target=runtime).plan(network, task).apply(network)
    target = deploy.target(runtime)
    target.export(made, tmp_path / f"net{target.suffix}")
    run = target.load(tmp_path / f"net{target.suffix}", like=made.signature)
    assert deploy.verify(made, run, (x,)).ok
    assert relative_error(run(x), network(x)) < 0.1


@pytest.mark.parametrize("shape", list(NETWORKS), ids=lambda c: c.__name__.lower())
def test_the_function_stays_wherever_products_can_be_put(shape, monkeypatch):
    monkeypatch.setattr(rescale, "UNEVEN", 0.0)
    torch.manual_seed(0)
    network, task, x = prepared(shape(), *NETWORKS[shape])
    plan = Quantize(rescale=True, correct_bias=False).plan(network, task)
    assert plan.products
    assert relative_error(products_alone(plan, network)(x), network(x)) < 1e-5
    assert relative_error(plan.apply(network)(x), network(x)) < 0.1


def test_rounded_values_have_even_channels_where_that_is_free(wrecked):
    network, task = wrecked
    plan = Quantize(rescale=True, correct_bias=False).plan(network, task)
    made, seen = products_alone(plan, network), {}
    node = {n.meta.get("module"): n.name for n in made.calls(aten.conv2d.default)}

    def watch(name):
        return lambda value: seen.update({name: torch.maximum(seen.get(name, torch.zeros(())),
                                                              value.abs().amax((0, 2, 3)))})

    reader = made.node(node["deep"])
    free = [node["up"], node["deep"], node["last"], reader.args[0].name]
    with made.taps({name: watch(name) for name in free}), torch.no_grad():
        for x, _ in task.batches("calibration"):
            made(x)
    for name in free:
        torch.testing.assert_close(seen[name], seen[name].max().expand_as(seen[name]), rtol=1e-4, atol=0)


def test_even_values_are_left_alone():
    torch.manual_seed(0)
    network, task, _ = prepared(Swish(3), 3, 8, 8)
    plan = Quantize(rescale=True).plan(network, task)
    assert plan.products == ()
    assert plan == Quantize().plan(network, task)


def test_the_ladder_rescales_and_leaves_no_layer_float(wrecked):
    network, task = wrecked
    plan = Ladder(score_drop=1.0).plan(network, task)
    assert "rescale" in [r.name for r in plan.trail if r.kept]
    assert len(plan.stored) == 6
    scores = [task.score(n, task.batches("validation")) for n in (network, plan.apply(network))]
    assert scores[0] - scores[1] <= 1.0


def test_other_networks_and_missing_data_are_told(wrecked):
    network, task = wrecked
    plan = Quantize(rescale=True).plan(network, task)
    torch.manual_seed(0)
    other = fw.capture(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10)), torch.zeros(2, 1, 8, 8))
    with pytest.raises(PlanError, match="plan again for this network"):
        plan.apply(other)
    with pytest.raises(PlanError, match="the plan lacks the tensor"):
        replace(plan, tensors={}).apply(network)
    with pytest.raises(TaskError, match="rescaling needs calibration data"):
        Quantize(rescale=True).plan(network, fw.Task(calibration=list))
