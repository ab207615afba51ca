"""What a training of another package tells of itself: the last call of the network, and where the targets are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from featherweight.errors import RecipeError
from featherweight.network import Network
from featherweight.task import Inputs

#: what the targets of a batch may be called in a mapping
TARGETS = ("labels", "label", "target", "targets", "y")


class LastCall:
    """The inputs and output of the last call of a network, by a hook on it until ``close``."""

    def __init__(self, network: Network) -> None:
        self._held: tuple[Inputs, Any] | None = None
        self.close: Callable[[], None] = network.register_forward_hook(self._keep, with_kwargs=True).remove

    def _keep(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._held = (kwargs if not args else args[0] if len(args) == 1 else args), output

    def take(self) -> tuple[Inputs, Any]:
        """The inputs and output, which are then let go. Raises RecipeError where the network was not called."""
        if self._held is None:
            raise RecipeError("the training step did not call the network that the callback follows; call "
                              "self.network(inputs) in it, with the network that fw.capture gave")
        held, self._held = self._held, None
        return held


class LearnedBeside(nn.Module):
    """The tensors that are learned beside a training, themselves (no copies), as parameters of a module."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        for index, tensor in enumerate(tensors):
            tensor._is_param = True  # by this torch takes a tensor for a Parameter
            self.register_parameter(str(index), tensor)  # type: ignore[arg-type]


def target_of(batch: Any) -> Any:
    """The targets of a batch: what is called as in TARGETS, or the second of a pair; None where there are none."""
    if isinstance(batch, Mapping):
        return next((batch[name] for name in TARGETS if name in batch), None)
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


__all__ = ["LastCall", "LearnedBeside", "target_of"]
