"""Codebooks at work in a training: the network computes with shared weights, whose indices settle on a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from featherweight.network import Network
from featherweight.numerics.kmeans import nearest
from featherweight.steps import Companion, Plan

#: a weight, whether entry 0 is a held zero -> its codebook [k] and index
Code = Callable[[Tensor, bool], tuple[Tensor, Tensor]]
Codes = dict[str, tuple[Tensor, Tensor]]


class Assigning(Protocol):
    """When weights are assigned: from ``begin`` to ``end`` of the training, anew every ``frequency``."""

    @property
    def begin(self) -> float: ...
    @property
    def end(self) -> float: ...
    @property
    def frequency(self) -> float: ...
    @property
    def keep_zeros(self) -> bool: ...
    @property
    def rate(self) -> float: ...
    def entries(self) -> int: ...


class Sharing(Companion):
    """Taps that give codebook[index] in the place of weights.

    The gradient passes to each weight as if nothing were shared (straight through), so that a weight can move to
    another entry, and to the entries as the mean over the weights that share them: an entry then moves as its weights
    do, at the learning rate of the weights. (Han et al. 2016, eq. 3, take the sum, at a rate of its own; an entry of
    thousands of weights diverges by it at the rate of the others.) What is zero when
    it comes to the tap (masked by whoever stands before) stays zero, at entry 0, where ``keep_zeros`` says so.
    """

    def __init__(self, network: Network, names: Sequence[str], code: Code, pace: Assigning,
                 plan: Callable[[Codes], Plan]) -> None:
        self.network, self.names, self.code, self.pace, self.plan = network, list(names), code, pace, plan
        self.books = {n: torch.zeros(pace.entries(), dtype=network.tensor(n).dtype, device=network.tensor(n).device,
                                     requires_grad=True) for n in names}
        self.index: dict[str, Tensor] = {}
        self.due: set[str] = set()
        self.on, self.done = False, -1
        self.removers: list[Callable[[], None]] = []
        for name in names:
            for node in network.reads_of(name):
                self.removers.append(network.add_tap(node.name, partial(self._shared, name)))

    def update(self, progress: float) -> None:
        pace = self.pace
        if progress < pace.begin:
            return
        due = int(min(progress, pace.end) / pace.frequency + 1e-9)
        if due > self.done and (progress < pace.end or not self.on):
            self.done, self.due = due, set(self.names)
        self.on = True

    def _shared(self, name: str, weight: Tensor) -> Tensor:
        if not self.on:
            return weight
        if name in self.due or name not in self.index:
            self._assign(name, weight.detach())
        book, index = self.books[name], self.index[name]
        looked_up = book[index.long()]
        if self.pace.keep_zeros:
            looked_up = looked_up * (weight.detach() != 0)
        return looked_up + (weight - weight.detach())

    @torch.no_grad()
    def _assign(self, name: str, weight: Tensor) -> None:
        """New indices; entries too at the first time, and where weights have a price of bits."""
        self.due.discard(name)
        book = self.books[name]
        if name not in self.index or self.pace.rate:
            found, self.index[name] = self.code(weight, self.pace.keep_zeros)
            book.copy_(torch.cat([found, found[-1:].expand(len(book) - len(found))]).to(book))
            return
        zero = int(self.pace.keep_zeros)
        order = torch.argsort(book[zero:]) + zero
        index = order[nearest(weight, book[order])]
        self.index[name] = index.masked_fill(weight == 0, 0) if zero else index

    def parameters(self) -> list[Tensor]:
        return list(self.books.values())

    def after_backward(self) -> None:
        for name, book in self.books.items():
            index = self.index.get(name)
            if book.grad is None or index is None:
                continue
            book.grad /= torch.bincount(index.reshape(-1), minlength=len(book)).clamp_min(1)
            if self.pace.keep_zeros:
                book.grad[0] = 0.0

    def state(self) -> dict[str, Tensor]:
        return {"done": torch.tensor(self.done), "on": torch.tensor(self.on),
                **{f"index.{n}": i.cpu() for n, i in self.index.items()}}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.done, self.on = int(state["done"]), bool(state["on"])
        self.index = {n: state[f"index.{n}"].to(self.books[n].device) for n in self.names if f"index.{n}" in state}

    def finish(self) -> Plan:
        self.update(1.0)
        self.close()
        for name in self.names:
            if name not in self.index:
                self._assign(name, self.network.tensor(name).detach())
        return self.plan({n: self._final(n) for n in self.names})

    def _final(self, name: str) -> tuple[Tensor, Tensor]:
        """Codebook without unused entries, ascending after a held zero; and the index into it."""
        book, index = self.books[name].detach(), self.index[name].long()
        used = torch.unique(index)
        held = self.pace.keep_zeros
        if held:
            used = torch.cat([used.new_zeros(1), used[used != 0]])
            rest = used[1:][torch.argsort(book[used[1:]])]
            order = torch.cat([used[:1], rest])
        else:
            order = used[torch.argsort(book[used])]
        place = torch.zeros(len(book), dtype=torch.int64, device=book.device)
        place[order] = torch.arange(len(order), device=book.device)
        return book[order], place[index].to(torch.uint8)

    def close(self) -> None:
        for remove in self.removers:
            remove()
        self.removers.clear()


__all__ = ["Sharing"]
