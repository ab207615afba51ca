"""Least squares on sums of squares: refits, and what the removal of a block of inputs costs at best.

Rows are observations. ``gram`` = X^T X [p, p] and ``cross`` = X^T Y [p, o] say all that a fit of Y [r, o] by
X [r, p] needs; both may have leading axes (the groups of a convolution). A block is ``size`` inputs side by side that
go together: the window of one channel.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Means, X^T X and X^T Y of rows that come batch by batch, about their means; summed in float64.

    The rows of ``add``: x [..., r, p] and y [..., r, o]. They are shifted by the first batch's mean before they are
    multiplied in their own dtype, which keeps float32 exact enough where means are large.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift: tuple[Tensor, Tensor] | None = None
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        if self._shift is None:
            self._shift = x.mean(-2, keepdim=True), y.mean(-2, keepdim=True)
        x, y = x - self._shift[0], y - self._shift[1]
        new = [x.mT @ x, x.mT @ y, x.sum(-2), y.sum(-2)]
        self.count += x.shape[-2]
        self._sums = [s + n.double() for s, n in zip(self._sums, new, strict=True)] if self._sums else \
            [n.double() for n in new]

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean of x [..., p] and of y [..., o], float64."""
        assert self._shift is not None
        _, _, x, y = self._sums
        return x / self.count + self._shift[0].squeeze(-2), y / self.count + self._shift[1].squeeze(-2)

    def products(self, centred: bool = True) -> tuple[Tensor, Tensor]:
        """X^T X [..., p, p] and X^T Y [..., p, o] divided by the number of rows, about the means or about zero."""
        gram, cross, x, y = self._sums
        x, y = x / self.count, y / self.count
        gram, cross = gram / self.count - _outer(x, x), cross / self.count - _outer(x, y)
        if not centred:
            mean_x, mean_y = self.means()
            gram, cross = gram + _outer(mean_x, mean_x), cross + _outer(mean_x, mean_y)
        return gram, cross


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def refit(gram: Tensor, cross: Tensor, weight: Tensor, ridge: float, lower: Tensor | None = None) -> Tensor:
    """The weights W' [..., o, p] that minimise ||Y - X W'^T||^2 + l ||W' - weight||^2, float64.

    l = ``ridge`` times the mean of the diagonal of ``gram``: where the rows say nothing, ``weight`` [..., o, p] stays.
    ``lower``: what ``factor(gram, ridge)`` gave, if it is at hand.
    """
    weight = weight.double()
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    residual = cross - gram @ weight.mT
    change: Tensor = torch.cholesky_solve(residual, factor(gram, ridge) if lower is None else lower)
    found: Tensor = torch.where(size > 0, weight + change.mT, weight)
    return found


def factor(gram: Tensor, ridge: float) -> Tensor:
    """Lower Cholesky factor of ``gram`` + l I [..., p, p], l = ``ridge`` times the mean of its diagonal; l is raised
    tenfold as often as the matrix is not positive definite in float64."""
    gram = gram.double()
    size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    size = torch.where(size > 0, size, torch.ones_like(size))
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    ridge = max(ridge, 1e-12)
    while True:
        found: Tensor
        found, info = torch.linalg.cholesky_ex(gram + ridge * size * unit)
        if not info.any() or ridge > 1e3:
            return found
        ridge *= 10


def reconstruction_errors(gram: Tensor, cross: Tensor, size: int, ridge: float = 1e-6) -> Tensor:
    """By how much the least squares ||Y - X W^T||^2 rise when one block of ``size`` inputs goes, the others refit.

    gram [p, p] and cross [p, o]; gives [p / size] in float64, in the units of ``gram`` (squares of Y, summed or
    averaged over rows as there). With H = gram^-1 and W the best weights, block c costs tr(W_c H_cc^-1 W_c^T): the
    optimal brain surgeon (Hassibi & Stork 1993, eq. 5) for blocks. For the change that a layer's own outputs suffer,
    write ``cross = gram @ weight.T``.
    """
    inverse = torch.cholesky_inverse(factor(gram, ridge))
    return _costs(inverse, inverse @ cross.double(), size)


def _costs(inverse: Tensor, weight: Tensor, size: int) -> Tensor:
    blocks = _diagonal_blocks(inverse, size)
    w = weight.view(-1, size, weight.shape[1])  # [c, size, o]
    found: Tensor = (w * torch.linalg.solve(blocks, w)).sum((1, 2))
    return found


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """[c * size, c * size] -> [c, size, size]."""
    count = matrix.shape[0] // size
    return matrix.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def backward_selection(gram: Tensor, cross: Tensor, size: int, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Blocks in the order in which they go when the cheapest goes first and all others are refit each time.

    gram [p, p], cross [p, o]; gives (order [c] int64, costs [c] float64): costs[i] is the rise of the least squares
    when order[i] goes after order[:i]. The inverse is downdated, H -= H_:c H_cc^-1 H_c:, which takes O(p^2 size).
    """
    inverse = torch.cholesky_inverse(factor(gram, ridge))
    weight = inverse @ cross.double()
    left = torch.arange(gram.shape[0] // size, device=gram.device)
    order, costs = [], []
    while len(left):
        rises = _costs(inverse, weight, size)
        worst = int(rises.argmin())
        order.append(left[worst])
        costs.append(rises[worst])
        mine = slice(worst * size, (worst + 1) * size)
        stays = torch.ones(inverse.shape[0], dtype=torch.bool, device=gram.device)
        stays[mine] = False
        part = inverse[stays][:, mine]
        pull = torch.linalg.solve(inverse[mine, mine], part, left=False)
        weight = weight[stays] - pull @ weight[mine]
        inverse = inverse[stays][:, stays] - pull @ part.mT
        left = torch.cat([left[:worst], left[worst + 1:]])
    return torch.stack(order), torch.stack(costs)
