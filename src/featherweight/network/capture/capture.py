"""``capture``: a model becomes a Network, whole where it can, in parts where it cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.errors import CaptureError
from featherweight.network import trees
from featherweight.network.assembly import Assembly
from featherweight.network.capture.export import Arguments
from featherweight.network.capture.outputs import Output, keep_outputs
from featherweight.network.capture.parts import capture_parts
from featherweight.network.capture.run import run
from featherweight.network.capture.sizes.asked import Dynamic
from featherweight.network.capture.whole import capture_whole
from featherweight.network.network import Network


def capture(model: nn.Module, example_inputs: Any, *, kwargs: Mapping[str, Any] | None = None,
            parts: bool | None = None, tolerance: float = 1e-4,
            keep_parametrizations: bool = False, dynamic: Dynamic | None = None,
            outputs: Sequence[Output] | None = None) -> Network | Assembly:
    """Captures ``model`` as a graph that runs, trains, saves and exports without the model's class.

    example_inputs: a tensor, a tuple (positions) or a dict (keywords) that ``model`` can be called with.
    kwargs: keyword inputs beside positional ones.
    parts: None captures whole and falls back to parts; True goes to parts at once; False never does.
    tolerance: largest difference allowed between the graph's and the model's outputs, relative to the largest output;
        compared on the examples and, where the batch is free, on batches of other sizes made from them.
    keep_parametrizations: weights that the model computes from parameters (weight_norm, spectral_norm, orthogonal,
        ``torch.nn.utils.prune``, LoRA) go on being computed. By default they are stored as they are in evaluation,
        which ``notes`` then says, so that every technique treats them like other weights.
    dynamic: the sizes that stay free beside the batch: input -> axis -> a name, ``{"input_ids": {1: "tokens"}}``; sizes
        of one name are equal. None finds them; ``{}`` fixes them at the examples' sizes.
    outputs: those that matter, ``("logits",)``, or places in a tuple of outputs, ``(0,)``: the network gives them
        alone. Hidden states among the outputs would hold the width of every layer that adds to them.

    The model is captured in evaluation mode and left as it was. Axis 0 of the inputs stays free (the batch) unless the
    model fixes it, and so does every other axis along which the model runs on other sizes (a length, a height). Each
    was proved by running the model on other sizes; ``notes`` and ``network.signature`` say which there are and how far
    they go, and a call beyond is refused. Raises CaptureError with module path, source line and the parts that
    could be captured.

    Example:
        >>> network = fw.capture(model, images[:2])
        >>> torch.allclose(network(images), model(images), atol=1e-5)
        True
    """
    args, keywords = _arguments(example_inputs, kwargs)
    _check(model)
    with _evaluating(model):
        try:
            expected = run(model, args, keywords)
        except Exception as error:
            raise CaptureError(
                f"the model does not run on the example inputs: {type(error).__name__}: {error}; "
                "pass inputs that model(*example_inputs) takes"
            ) from error
        trees.register_dataclasses(expected)
        if parts is not True:
            try:
                network = capture_whole(model, [(args, keywords)], expected, tolerance, keep_parametrizations, dynamic,
                                        costly=False)
                if outputs is not None:
                    keep_outputs(network, [outputs] if isinstance(outputs, str) else outputs)
                return network
            except CaptureError as error:
                if parts is False or dynamic or outputs is not None:
                    raise
                whole_error = error
        else:
            whole_error = CaptureError("parts were asked for")
        return capture_parts(model, args, keywords, expected, tolerance, keep_parametrizations, whole_error)


def _check(model: Any) -> None:
    """Raises CaptureError for what is no PyTorch module in Python."""
    if isinstance(model, (Network, Assembly)):
        raise CaptureError("this model is captured already; use it as it is")
    if isinstance(model, torch.export.ExportedProgram):
        raise CaptureError("this is an exported program; write capture(program.module(), example_inputs), or pass the "
                           "model that it was exported from")
    if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise CaptureError("this is TorchScript, whose Python is gone; pass the module that it was scripted or traced "
                           "from")
    if not isinstance(model, nn.Module):
        raise CaptureError(f"capture takes a torch.nn.Module, not a {type(model).__name__}; for a function, write a "
                           "module whose forward calls it")


def _arguments(example: Any, kwargs: Mapping[str, Any] | None) -> Arguments:
    keywords = dict(kwargs or {})
    if isinstance(example, Tensor):
        return (example,), keywords
    if isinstance(example, Mapping):
        return (), {**example, **keywords}
    if isinstance(example, (tuple, list)):
        return tuple(example), keywords
    raise CaptureError(f"example inputs are a {type(example).__name__}; expected a tensor, a tuple or a dict, e.g. "
                       "capture(model, torch.randn(1, 3, 224, 224))")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while. A module that has one mode alone (of ``torch.export``) stays in that."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        with suppress(NotImplementedError):
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
