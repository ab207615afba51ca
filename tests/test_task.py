"""Splits as people have them, and what is said of those that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import featherweight as fw
from featherweight.steps import Context

X, Y = torch.randn(8, 4), torch.randint(0, 3, (8,))


class Indexed:
    """Batches by number, as old iterables have them."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index >= 2:
            raise IndexError(index)
        return X[4 * index:][:4], Y[4 * index:][:4]


#: name -> a split of two batches of four
SPLITS: dict[str, Callable[[], Any]] = {
    "a function": lambda: lambda: ((X[i:i + 4], Y[i:i + 4]) for i in (0, 4)),
    "a list": lambda: [(X[:4], Y[:4]), (X[4:], Y[4:])],
    "a DataLoader": lambda: DataLoader(TensorDataset(X, Y), batch_size=4),
    "a function that gives a DataLoader": lambda: lambda: DataLoader(TensorDataset(X, Y), batch_size=4),
    "batches by number": Indexed,
    "arrays of numpy": lambda: [(X[:4].numpy().astype(np.float64), Y[:4].numpy()), (X[4:].numpy(), Y[4:].numpy())],
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_is_gone_through_anew_each_time(name: str) -> None:
    task = fw.Task(validation=SPLITS[name]())
    for _ in range(2):
        found = list(task.batches("validation"))
        torch.testing.assert_close(torch.cat([x for x, _ in found]), X)
        torch.testing.assert_close(torch.cat([y for _, y in found]), Y)
    assert len(list(task.batches("validation", 1))) == 1


def test_a_network_trains_on_a_loader_and_on_arrays() -> None:
    net = fw.capture(nn.Linear(4, 3), X)
    trained = [fw.recover.Train(epochs=2).fit(net, fw.Task(train=SPLITS[name](), loss=nn.functional.cross_entropy),
                                              Context()) for name in ("a DataLoader", "arrays of numpy")]
    torch.testing.assert_close(trained[0].tensor("weight"), trained[1].tensor("weight"))
    assert not torch.equal(trained[0].tensor("weight"), net.tensor("weight"))


def failing() -> Iterator[tuple[Tensor, Tensor]]:
    yield X, Y
    raise KeyError("label")


def nowhere() -> Any:
    raise OSError("no such folder")


#: name -> (split, the message)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "used up": (lambda: iter([(X, Y)]), r"validation split is a list_iterator, which can be gone through only once; "
                                        r"write Task\(validation=lambda: my_batches\(\)"),
    "a number": (lambda: 3, "validation split gives a int; expected batches"),
    "no pairs": (lambda: [X], "validation split gave Tensor; expected pairs"),
    "an error in it": (lambda: failing, "your validation split raised KeyError at batch 1: 'label'"),
    "an error at its start": (lambda: nowhere, "your validation split raised OSError: no such folder"),
    "NaN": (lambda: [(X, Y), ({"x": torch.full((2, 4), torch.nan)}, Y)],
            "batch 1 of the validation split has inputs that are NaN"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_split_that_cannot_be_used_is_told(name: str) -> None:
    split, message = WRONG[name]
    with pytest.raises(fw.errors.TaskError, match=message):
        list(fw.Task(validation=split()).batches("validation"))


def test_an_error_of_the_one_who_reads_is_not_the_splits() -> None:
    def read() -> None:
        for _ in fw.Task(train=SPLITS["a list"]()).batches("train"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read()
