"""Targets without a teacher: label smoothing, the network's own past, auxiliary exits; a bound for regression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, softmax

from featherweight.distill.features import keep, projector
from featherweight.distill.losses.feature import hint
from featherweight.distill.losses.response import bounded, divergence, soft_cross_entropy, softened
from featherweight.distill.outputs import check_output, choose, targets
from featherweight.distill.taps.paths import output_node
from featherweight.distill.taps.places import Place, places, stages
from featherweight.distill.teachers import Teacher, check_teacher, started, tried
from featherweight.errors import RecipeError
from featherweight.network import Network
from featherweight.network.devices import device_of
from featherweight.steps import Companion, Context
from featherweight.steps.options import Numbers, check_numbers
from featherweight.task import Batch, Inputs, Task, call

SHARE = Numbers(0.1, least=0, most=1, noun="a share,")


@dataclass(frozen=True)
class Smoothing:
    """Label smoothing: the cross-entropy with ``share`` of each target spread evenly over all classes.

    It takes the place of the task's loss. Targets are integer classes. Szegedy et al. 2016, section 7.

    Example:
        >>> trained = fw.recover.Train(beside=(fw.distill.Smoothing(0.1),)).fit(network, task, fw.steps.Context())
    """

    share: float = 0.1
    output: str | int | None = None

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_numbers(self, {"share": SHARE})
        check_output(self)

    def start(self, network: Network, task: Task, context: Context) -> Companion:
        self.check()
        return _Softened(self)


class _Softened(Companion):
    def __init__(self, options: Smoothing) -> None:
        self.options = options

    @property
    def task_weight(self) -> float:
        return 0.0

    def loss(self, inputs: Inputs, output: Any, target: Any) -> Tensor:
        logits, classes = choose(output, self.options.output), targets(target, "Smoothing")
        return soft_cross_entropy(logits, softened(classes, logits.shape[1], self.options.share))


@dataclass(frozen=True)
class OwnPast:
    """Progressive self-distillation: targets mixed with what the network itself gave before, more and more of it.

    share: of the past outputs in the target at the end of the training; it rises linearly from 0. It takes the place of
    the task's loss. The past is a copy of the network, taken anew every ``every`` of the training (an epoch in the
    paper). Targets are integer classes. PS-KD, Kim et al. 2021, eqs. 6 and 7.

    Example:
        >>> step = fw.recover.Train(epochs=2, beside=(fw.distill.OwnPast(0.8, every=0.5),))
        >>> trained = step.fit(network, task, fw.steps.Context())
    """

    share: float = 0.8
    every: float = 0.1
    output: str | int | None = None

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_numbers(self, {"share": SHARE, "every": Numbers(0.1, above=0, most=1, noun="a share of the training,")})
        check_output(self)

    def start(self, network: Network, task: Task, context: Context) -> Companion:
        self.check()
        return _Past(self, network)


class _Past(Companion):
    def __init__(self, options: OwnPast, network: Network) -> None:
        self.options, self.network, self.past = options, network, network.copy().eval()
        self.progress = torch.zeros((), dtype=torch.float64)
        self.taken = torch.zeros((), dtype=torch.int64)

    @property
    def task_weight(self) -> float:
        return 0.0

    def update(self, progress: float) -> None:
        self.progress = torch.tensor(progress, dtype=torch.float64)
        part = int(progress / self.options.every + 1e-9)
        if part > int(self.taken):
            self.taken = torch.tensor(part)
            held = {name: tensor.detach().clone() for name, tensor in self.network.tensors().items()}
            with torch.no_grad():
                for name, tensor in self.past.tensors().items():
                    tensor.copy_(held[name])

    def loss(self, inputs: Inputs, output: Any, target: Any) -> Tensor:
        logits, classes = choose(output, self.options.output), targets(target, "OwnPast")
        with torch.no_grad():
            before = softmax(choose(call(self.past, inputs), self.options.output).float(), 1)
        share = self.options.share * float(self.progress) if int(self.taken) else 0.0
        return soft_cross_entropy(logits, softened(classes, logits.shape[1], share, before))

    def state(self) -> dict[str, Tensor]:
        return {"taken": self.taken, **{f"past/{n}": t for n, t in self.past.tensors().items()}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.taken = state["taken"].cpu()
        with torch.no_grad():
            for name, tensor in self.past.tensors().items():
                tensor.copy_(state[f"past/{name}"])


@dataclass(frozen=True)
class Exits:
    """Be your own teacher: classifiers at earlier stages learn from targets, and from the network's own output.

    taps: "stages", or paths of modules; the last stage is the network's own. weight: on the sum of the exits' losses,
    ``(1 - share) * cross-entropy + share * T^2 KL`` from the output, plus ``hint`` times the squared difference of
    their features to the last stage's. The exits are a pooling and two linear layers each (BYOT's have convolutions);
    they are trained along and are gone from the result. Zhang et al. 2019, eqs. 1 to 5.

    Example:
        >>> exits = fw.distill.Exits(taps=("2",))
        >>> trained = fw.recover.Train(beside=(exits,)).fit(network, task, fw.steps.Context())
    """

    taps: str | tuple[str, ...] = "stages"
    share: float = 0.3
    hint: float = 0.03
    temperature: float = 3.0
    weight: float = 1.0
    output: str | int | None = None

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_numbers(self, {"share": SHARE, "hint": Numbers(0.03, least=0), "temperature": Numbers(3.0, above=0),
                             "weight": Numbers(1.0, above=0)})
        check_output(self)

    def start(self, network: Network, task: Task, context: Context) -> Companion:
        """Taps at the exits. Raises RecipeError where there is no place for one."""
        self.check()
        known = places(network)
        named = () if self.taps == "stages" else (self.taps,) if isinstance(self.taps, str) else self.taps
        found = [known[output_node(network, path)] for path in named] if named else stages(network)[:-1]
        if not found:
            raise RecipeError("distill.Exits found one resolution only, and no place for an exit; write "
                              "Exits(taps=(\"layer1\", \"layer2\"))")
        last = stages(network)[-1:] or [found[-1]]
        return _Exiting(self, network, found, last[0], context.seed)


class _Exiting(Companion):
    def __init__(self, options: Exits, network: Network, found: list[Place], last: Place, seed: int) -> None:
        self.options, self.found, self.last, self.device = options, found, last, device_of(network)
        output = next(n for n in network.graph.nodes if n.op == "output").all_input_nodes
        values = network.values()
        classes = next(int(values[n.name].shape[-1]) for n in output if values[n.name].is_floating_point())
        self.widened = [projector(last.width, p.width, self.device, seed, "exit", p.node) for p in found]
        self.heads = [projector(classes, last.width, self.device, seed, "head", p.node) for p in found]
        self._seen: dict[str, Tensor] = {}
        self._removers = [network.add_tap(node, partial(keep, self._seen, node))
                          for node in dict.fromkeys(p.node for p in (*found, last))]

    @property
    def notes(self) -> list[str]:
        return [f"distill.Exits stood at {', '.join(map(str, self.found))}; they are gone"]

    def parameters(self) -> list[Tensor]:
        return [*self.widened, *self.heads]

    def loss(self, inputs: Inputs, output: Any, target: Any) -> Tensor:
        options, classes = self.options, targets(target, "Exits")
        with torch.autocast(self.device.type, enabled=False):
            logits = choose(output, options.output).float().detach()
            last = self._pooled(self.last).detach()
            total = logits.new_zeros(())
            for place, widen, head in zip(self.found, self.widened, self.heads, strict=True):
                features = linear(self._pooled(place), widen)
                given = linear(features.relu(), head)
                total = total + (1 - options.share) * cross_entropy(given, classes)
                total = total + options.hint * hint(features, last)
                total = total + options.share * divergence(given, logits, options.temperature)
        self._seen.clear()
        return options.weight * total

    def _pooled(self, place: Place) -> Tensor:
        x = self._seen[place.node].float().movedim(place.axis, 1)
        return x.flatten(2).mean(2) if x.dim() > 2 else x

    def close(self) -> None:
        for remove in self._removers:
            remove()


@dataclass(frozen=True)
class Regression:
    """The teacher as a bound: the squared error to the target counts only where the student is not better than it.

    weight: on the term, which is added to the task's loss. margin: by how much (in squared units of the target, summed
    over a sample) the student has to be better. teacher, output: as in ``Logits``. Chen et al. 2017, eq. 5.

    Example:
        >>> step = fw.recover.Train(beside=(fw.distill.Regression(weight=0.5),))
        >>> regression = fw.Task(train=[(images, torch.randn(32, 4))], loss=torch.nn.functional.mse_loss)
        >>> trained = step.fit(network, regression, fw.steps.Context(original=network))
    """

    weight: float = 0.5
    margin: float = 0.0
    teacher: Any = field(default=None, repr=False)
    output: str | int | None = None

    def check(self) -> None:
        """Raises RecipeError for options that make no sense."""
        check_numbers(self, {"weight": Numbers(0.5, above=0), "margin": Numbers(0.0, least=0)})
        check_output(self)
        check_teacher("Regression", self.teacher)

    def check_on(self, network: Network, task: Task, batch: Batch) -> None:
        """Raises RecipeError where the teacher or the target does not fit what ``network`` gives for a batch."""
        teacher = tried(self.teacher, network, batch[0], "Regression")
        with torch.no_grad():
            _Bound(self, teacher).loss(batch[0], call(network, batch[0]), batch[1])

    def start(self, network: Network, task: Task, context: Context) -> Companion:
        self.check()
        return _Bound(self, started(self.teacher, context.original, device_of(network), "Regression"))


class _Bound(Companion):
    def __init__(self, options: Regression, teacher: Teacher) -> None:
        self.options, self.teacher = options, teacher

    def loss(self, inputs: Inputs, output: Any, target: Any) -> Tensor:
        given = choose(output, self.options.output)
        wanted = choose(self.teacher.values(inputs)[0], self.options.output, "the teacher")
        asked = list(getattr(target, "shape", ()))
        if not list(given.shape) == list(wanted.shape) == asked:
            raise RecipeError(f"distill.Regression was given outputs of shape {list(given.shape)}, by the teacher "
                              f"{list(wanted.shape)}, and a target of {asked}; expected one shape")
        return self.options.weight * bounded(given, wanted, target, self.options.margin)
