"""Small networks that every step and every law is tried on: one row each.

A model of the table is seeded, in evaluation mode, and has non-trivial biases and batch statistics. Write
``network(problem)`` for its capture and ``task(problem)`` for tiny seeded data with a loss and a score.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

import featherweight as fw

torch.set_num_threads(1)  # tests run side by side
CLASSES = 5
BATCHES = 3


@dataclass(frozen=True)
class Problem:
    """One small network. ``factory()`` gives the model, ``example(batch)`` inputs (a tensor, tuple or dict)."""

    name: str
    build: Callable[[], nn.Module]
    example: Callable[..., Any]
    #: the only batch size it takes, None where any goes
    batch: int | None = None

    def factory(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
            unsettle(model)
            if hasattr(model, "settle"):
                with torch.no_grad():
                    model.settle()
        return model.eval()

    def __str__(self) -> str:
        return self.name


def unsettle(model: nn.Module) -> None:
    """Gives normalizations, biases and batch statistics values that a forgotten one would be noticed by."""
    for module in model.modules():
        norm = isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm))
        if norm and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            nn.init.normal_(module.bias, std=0.2)
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)


def conv(i: int, o: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *[nn.ReLU(inplace=True)] * act)


def images(batch: int = 2, channels: int = 3, size: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def rows(batch: int = 2, width: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed))


def tokens(batch: int = 2, length: int = 6, words: int = 20, seed: int = 1) -> Tensor:
    return torch.randint(words, (batch, length), generator=torch.Generator().manual_seed(seed))


# ---- the models

def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, CLASSES))


def conv_bn() -> nn.Module:
    """Plain convolutions ending in a flatten, so that one channel is several columns of the classifier."""
    return nn.Sequential(conv(3, 16), conv(16, 24, stride=2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24 * 4, CLASSES))


class ShortcutA(nn.Module):
    """He et al. 2016, option A: stride by slicing, new channels padded with zeros."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = o - i, stride
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        out += x
        return F.relu(out)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.layer1 = nn.Sequential(ShortcutA(8, 8, 1), ShortcutA(8, 8, 1))
        self.layer2 = nn.Sequential(ShortcutA(8, 16, 2), ShortcutA(16, 16, 1))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(F.avg_pool2d(x, x.shape[3]).flatten(1))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project (Sandler et al. 2018)."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.same = i == o and stride == 1
        self.conv = nn.Sequential(conv(i, 4 * i, 1), conv(4 * i, 4 * i, 3, stride, groups=4 * i),
                                  conv(4 * i, o, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.same else self.conv(x)


def depthwise() -> nn.Module:
    return nn.Sequential(conv(3, 8, stride=2), InvertedResidual(8, 8, 1), InvertedResidual(8, 12, 2),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES))


def grouped() -> nn.Module:
    """ResNeXt's grouped convolution between pointwise ones."""
    return nn.Sequential(conv(3, 16), conv(16, 16, 3, groups=4), conv(16, 24, 1), conv(24, 24, 3, 2, groups=2),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES))


class Concat(nn.Module):
    """Two branches side by side, then a dense connection (Huang et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.left = conv(8, 8, 1)
        self.right = conv(8, 12, 3)
        self.join = conv(20, 16)
        self.fc = nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = torch.cat([self.join(x), x], 1)
        return self.fc(x.mean((2, 3)))


class Shuffle(nn.Module):
    """Channels split in halves, one half convolved, joined and shuffled (Ma et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.branch = nn.Sequential(conv(8, 8, 1), conv(8, 8, 3, groups=8, act=False), conv(8, 8, 1))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            a, b = x.chunk(2, dim=1)
            x = torch.cat((a, self.branch(b)), dim=1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.fc(x.mean([2, 3]))


class SqueezeExcite(nn.Module):
    """Hu et al. 2018: channels scaled by what their means say."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.fc1 = nn.Conv2d(16, 8, 1)
        self.fc2 = nn.Conv2d(8, 16, 1)
        self.out = conv(16, 16, stride=2)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        scale = torch.sigmoid(self.fc2(F.silu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))
        return self.fc(self.out(scale * x).mean((2, 3)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln2(x))


class Attention(nn.Module):
    """Patches, a class token, two blocks, as a vision transformer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 5, 16))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.hidden = nn.Linear(16, 16)
        self.output = nn.Linear(16, 20, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.output(torch.tanh(self.hidden(self.embedding(words)).mean(1)))


class TiedLinear(nn.Module):
    """Two linear layers and two convolutions of the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2.weight = self.conv1.weight
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3))
        return self.fc(F.relu(self.b(F.relu(self.a(x)))))


class Shared(nn.Module):
    """One block, batch norm included, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.block = conv(12, 12)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(self.block(self.block(x)).mean((2, 3)))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = conv(3, 12)
        self.row = nn.Linear(12, 12)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, image: Tensor, row: Tensor) -> Tensor:
        return self.fc(F.relu(self.image(image).mean((2, 3)) + self.row(row)))


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 16), conv(16, 16, stride=2))
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Any]:
        features = self.body(x)
        return {"logits": self.fc(features.mean((2, 3))), "features": [features, (features.amax((2, 3)),)]}


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor
    loss: Tensor | None = None


class DataclassOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 24)
        self.second = nn.Linear(24, CLASSES)

    def forward(self, inputs: Tensor, scale: Tensor) -> Answer:
        hidden = F.relu(self.first(inputs)) * scale
        return Answer(self.second(hidden), hidden)


def no_momentum() -> nn.Module:
    """Batch norms that average over all batches, that keep no statistics and that have no weight."""
    return nn.Sequential(nn.Conv2d(3, 12, 3, bias=True), nn.BatchNorm2d(12, momentum=None), nn.ReLU(),
                         nn.Conv2d(12, 12, 3), nn.BatchNorm2d(12, affine=False), nn.ReLU(),
                         nn.Conv2d(12, 12, 3), nn.InstanceNorm2d(12, affine=True), nn.GroupNorm(3, 12),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES), nn.BatchNorm1d(CLASSES))


def dropout() -> nn.Module:
    return nn.Sequential(conv(3, 16), nn.Dropout2d(0.3), conv(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Dropout(0.5, inplace=True), nn.Linear(16, 24), nn.ReLU(), nn.Dropout(0.2),
                         nn.Linear(24, CLASSES))


def transposed() -> nn.Module:
    """An encoder and a decoder of transposed convolutions (one grouped); gives an image."""
    up = nn.ConvTranspose2d(16, 8, 2, 2, bias=False)
    again = nn.ConvTranspose2d(8, 8, 3, 1, 1, groups=2)
    return nn.Sequential(conv(3, 16, stride=2), up, nn.BatchNorm2d(8), nn.ReLU(), again, nn.BatchNorm2d(8), nn.ReLU(),
                         nn.Conv2d(8, 3, 1))


class StaticBatch(nn.Module):
    """Knows its batch of 4, as an unlucky ``view`` makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv(3, 8)
        self.fc = nn.Linear(8 * 64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).reshape(4, 8 * 64))


class Gated(nn.Module):
    """A gated unit: one linear layer's output cut in two."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 32)
        self.down = nn.Linear(16, 12)
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.fc(x + self.down(F.silu(gate) * value))


class Conv1d(nn.Module):
    """One-dimensional convolutions and a recurrent layer over a signal."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(3, 12, 3, padding=1), nn.BatchNorm1d(12), nn.ReLU(),
                                  nn.Conv1d(12, 12, 3, padding="same"), nn.LeakyReLU(0.1))
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x.flatten(2)).amax(2))


class Conv1D(nn.Module):
    """GPT-2's linear layer: its weight lies [i, o], and what it reads is laid out in rows first."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(i, o) / i ** 0.5)
        self.bias = nn.Parameter(torch.zeros(o))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return rows.view(*x.shape[:-1], self.weight.shape[1])


class Gpt2(nn.Module):
    """A block of GPT-2 (Radford et al. 2019), and a head that is a bare product."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(20, 16)
        self.wpe = nn.Parameter(torch.randn(6, 16))
        self.ln_1, self.ln_2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.c_attn, self.c_proj = Conv1D(16, 48), Conv1D(16, 16)
        self.c_fc, self.c_out = Conv1D(16, 32), Conv1D(32, 16)
        self.head = nn.Parameter(torch.randn(16, CLASSES))

    def forward(self, words: Tensor) -> Tensor:
        x = self.wte(words) + self.wpe
        heads = [t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).chunk(3, -1)]
        y = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.c_proj(y)
        x = x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))
        return x.mean(1) @ self.head


class Silent(nn.Module):
    """Channels that are zero for good: dead filters without variance, a branch that batch norm multiplies by zero, an
    input that no weight reads, a row of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.body = nn.Sequential(conv(12, 12), conv(12, 12, act=False))
        self.join = conv(12, 8, 1)
        self.fc = nn.Linear(8, CLASSES)

    def settle(self) -> None:
        """After all tensors have been drawn: those that are zero."""
        filters, norm = self.stem[0], self.stem[1]
        for tensor in (filters.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor[:5] = 0
        self.body[1][1].weight.zero_()
        self.body[1][1].bias.zero_()
        self.join[0].weight[:, :3] = 0
        self.fc.weight[1] = self.fc.bias[1] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(self.join(F.relu(x + self.body(x))).mean((2, 3)))


class Spread(nn.Module):
    """Channels from 1e-18 to 1e6 in size, side by side in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.mix = nn.Conv2d(12, 12, 1)
        self.up = nn.Linear(12, 16)
        self.fc = nn.Linear(16, CLASSES)

    def settle(self) -> None:
        """Every second channel tiny, every fourth large."""
        for layer in (self.conv, self.mix, self.up):
            layer.weight[::2] *= 1e-18
            layer.bias[::2] *= 1e-18
            layer.weight[1::4] *= 1e7

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(F.relu(self.conv(x))).mean((2, 3))
        return self.fc(F.relu(self.up(torch.tanh(x))))


class Recurrent(nn.Module):
    """Words, a recurrent layer, two experts mixed by a gate: matrices that are read by no linear call."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12)
        self.lstm = nn.LSTM(12, 16, batch_first=True)
        self.gate = nn.Linear(16, 2)
        self.experts = nn.Parameter(torch.randn(2, 16, 8) / 4)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        x = self.lstm(self.words(words))[0].mean(1)
        return self.fc((torch.matmul(x, self.experts) * self.gate(x).softmax(1).t()[:, :, None]).sum(0))


def _two(batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    return images(batch, seed=seed), rows(batch, seed=seed + 1000)


def _named(batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    return {"inputs": rows(batch, seed=seed), "scale": rows(batch, 1, seed=seed + 1000)}


def _four(batch: int = 4, seed: int = 1) -> Tensor:
    return images(4, seed=seed)


PROBLEMS: dict[str, Problem] = {p.name: p for p in [
    Problem("mlp", mlp, rows),
    Problem("conv_bn", conv_bn, images),
    Problem("residual", Residual, images),
    Problem("depthwise", depthwise, images),
    Problem("grouped", grouped, images),
    Problem("concat", Concat, images),
    Problem("shuffle", Shuffle, images),
    Problem("squeeze_excite", SqueezeExcite, images),
    Problem("attention", Attention, images),
    Problem("tied", Tied, tokens),
    Problem("tied_linear", TiedLinear, functools.partial(images, channels=8)),
    Problem("shared", Shared, images),
    Problem("two_inputs", TwoInputs, _two),
    Problem("dict_output", DictOutput, images),
    Problem("dataclass_output", DataclassOutput, _named),
    Problem("no_momentum", no_momentum, images),
    Problem("dropout", dropout, images),
    Problem("transposed", transposed, images),
    Problem("static_batch", StaticBatch, _four, batch=4),
    Problem("gated", Gated, rows),
    Problem("conv1d", Conv1d, images),
    Problem("gpt2", Gpt2, tokens),
    Problem("silent", Silent, images),
    Problem("spread", Spread, images),
    Problem("recurrent", Recurrent, tokens),
]}


def agrees_in_runtimes(network: fw.Network, x: Tensor, folder: Path,
                       names: Collection[str] = ("onnxruntime", "openvino")) -> None:
    """The network's files give what it gives."""
    wanted = network(x).detach()
    for name in names:
        runtime = fw.deploy.target(name)
        file = folder / f"network{runtime.suffix}"
        runtime.export(network, file)
        runner = runtime.load(file, 1, like=network.signature)
        torch.testing.assert_close(runner(x), wanted, rtol=1e-3, atol=1e-4)
        runner.close()


@functools.cache
def _captured(name: str) -> fw.Network:
    problem = PROBLEMS[name]
    network = fw.capture(problem.factory(), problem.example(), parts=False)
    assert isinstance(network, fw.Network)
    return network


def network(problem: Problem) -> fw.Network:
    """A fresh copy of the problem's captured network."""
    return _captured(problem.name).copy()


def first_tensor(output: Any) -> Tensor:
    """The output's first tensor as rows [n, anything]: what loss and score look at."""
    return next(v for v in pytree.tree_leaves(output) if isinstance(v, Tensor)).flatten(1)


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    return [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor)]


def loss(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(first_tensor(output), target)


def score(predict: Callable[..., Any], batches: Any) -> float:
    """Share of samples, in percent, whose largest entry is where the untouched model's is."""
    from featherweight.task import call

    right = total = 0
    with torch.no_grad():
        for inputs, target in batches:
            right += int((first_tensor(call(predict, inputs)).argmax(1) == target).sum())
            total += len(target)
    return 100.0 * right / total


def task(problem: Problem, batch: int = 8, batches: int = BATCHES) -> fw.Task:
    """Seeded noise; the targets are what the untouched model says."""
    from featherweight.task import call

    @functools.cache
    def data(first: int) -> list[tuple[Any, Tensor]]:
        model = problem.factory()
        found = []
        with torch.no_grad():
            for i in range(batches):
                inputs = problem.example(problem.batch or batch, seed=first + i)
                found.append((inputs, first_tensor(call(model, inputs)).argmax(1)))
        return found

    def split(first: int) -> Callable[[], Iterator[Any]]:
        return lambda: iter(data(first))

    return fw.Task(train=split(100), calibration=split(200), validation=split(300), test=split(400),
                   loss=loss, score=score, score_name="agreement")
