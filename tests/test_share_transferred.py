"""Transferred filters: orbits found, the best that a slow search finds, and the graph that makes the weight."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.errors import PlanError, RecipeError
from featherweight.numerics.sharing.orbits import GROUPS, images, orbits, turns_of
from featherweight.share import Transferred
from featherweight.task import Task
from problems import agrees_in_runtimes


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("group", "window", "size"), [("scale", (3, 3), 1), ("flips", (3, 3), 4), ("flips", (5,), 2),
                                                       ("rotations", (3, 3), 4), ("dihedral", (2, 2), 8),
                                                       ("dihedral", (3, 3), 8), ("flips", (2, 2, 2), 8)])
def test_turns_are_a_group(group: str, window: tuple[int, ...], size: int) -> None:
    turns = {tuple(t) for t in turns_of(group, window).tolist()}
    assert len(turns) == size
    assert {tuple(a[i] for i in b) for a, b in itertools.product(turns, turns)} == turns


@pytest.mark.parametrize("group", GROUPS)
def test_filters_that_are_images_of_few_are_found(group: str) -> None:
    turns = turns_of(group, (3, 3))
    base, generator = randn(3, 4, 9), torch.Generator().manual_seed(1)
    place = torch.cat([torch.arange(3), torch.randint(3 * len(turns), (17,), generator=generator)])
    rows = images(base, turns)[place] * randn(20, seed=2)[:, None, None]
    made = orbits(rows, 3, turns)
    assert made.error < 1e-12
    torch.testing.assert_close(made.rows(turns), rows)


def test_every_row_takes_its_best_image_and_every_base_is_the_best_of_its_rows() -> None:
    """Written out row by row: no image and scale are nearer, and no other base serves its rows better."""
    rows, turns = randn(24, 2, 9), turns_of("dihedral", (3, 3))
    made = orbits(rows, 4, turns)
    found = made.rows(turns)
    assert made.error == pytest.approx(float((found - rows).square().sum() / rows.square().sum()))
    for j, row in enumerate(rows):
        best = min(float((row - (row * image).sum() * image).square().sum()) for b in made.base for turn in turns
                   for image in [b[:, turn]])
        assert float((found[j] - row).square().sum()) == pytest.approx(best, rel=1e-6)
    assert made.error < orbits(rows, 4, turns_of("scale", (3, 3))).error
    assert orbits(rows, 24, turns).error < 1e-12


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, groups=2)
        self.long, self.out = nn.Conv2d(32, 24, (1, 5)), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.long(torch.relu(self.second(torch.relu(self.first(x)))))).mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> fw.Network:
    torch.manual_seed(0)
    return fw.capture(Net().eval(), torch.randn(2, 3, 12, 12))  # type: ignore[return-value]


@pytest.mark.parametrize("unit", ["filter", "window"])
@pytest.mark.parametrize("group", GROUPS)
def test_the_graph_makes_the_weights_and_runtimes_take_it(network: fw.Network, group: str, unit: str,
                                                         tmp_path: Path) -> None:
    plan = Transferred(group, unit, windows=8).plan(network, Task())
    small, slow, x = plan.apply(network), network.copy(), torch.randn(3, 3, 12, 12)
    assert "second.weight" in [one.weight for one in plan.orbits]
    assert ("long.weight" in [one.weight for one in plan.orbits]) == (group in ("scale", "flips"))
    for one in plan.orbits:
        base, place, scale = (plan.tensors[f"{one.weight}_{part}"] for part in ("base", "place", "scale"))
        turns = turns_of(group, one.shape[2:])
        made = [float(s) * base[p % len(base)][:, turns[p // len(base)]] for p, s in zip(place.tolist(), scale,
                                                                                      strict=True)]
        slow.set_tensor(one.weight, torch.stack(made).reshape(one.shape))
        weight = network.tensor(one.weight).detach()
        lost = (slow.tensor(one.weight).detach() - weight).square().sum() / weight.square().sum()
        assert one.error == pytest.approx(float(lost), rel=1e-3)
    torch.testing.assert_close(small(x), slow(x), rtol=1e-4, atol=1e-5)
    stays = 9500 - sum(torch.Size(one.shape).numel() for one in plan.orbits)
    assert fw.codec.archive_bytes(small) < (0.4 + 0.6 * stays / 9500) * fw.codec.archive_bytes(network)
    if (group, unit) in (("dihedral", "filter"), ("flips", "window")):
        agrees_in_runtimes(small, x, tmp_path)


def test_stored_filters_are_trained(network: fw.Network) -> None:
    small = Transferred().plan(network, Task()).apply(network)
    x, y = torch.randn(8, 3, 12, 12), torch.randint(4, (8,))
    task = Task(train=lambda: [(x, y)], loss=nn.functional.cross_entropy)
    trained = fw.recover.Train(epochs=2, lr=0.1).fit(small, task, fw.steps.Context())
    for part in ("base", "scale"):
        assert not torch.equal(trained.tensor(f"second.weight_{part}"), small.tensor(f"second.weight_{part}"))
    assert torch.equal(trained.tensor("second.weight_place"), small.tensor("second.weight_place"))


def test_what_stays_is_named_and_what_is_wrong_refused(network: fw.Network) -> None:
    reasons = {s.path: s.reason for s in Transferred().plan(network, Task()).skipped}
    assert reasons["out.weight"] == "no convolution with a window of more than one place"
    assert reasons["long.weight"] == "group='dihedral' turns square windows of two axes only"
    for step, message in ((Transferred("turns"), "expected one of 'scale'"), (Transferred(share=0.0), "share=0.0"),
                          (Transferred(unit="layer"), "expected one of 'filter'"),
                          (Transferred(windows=0), "windows=0")):
        with pytest.raises(RecipeError, match=message):
            step.check()
    plan = Transferred().plan(network, Task())
    with pytest.raises(PlanError, match="which this network does not have"):
        plan.apply(plan.apply(network))
