"""What a test process does once, to be quick: nothing here changes what a test sees."""

from __future__ import annotations

import functools
import gc

import onnxscript.values

# torch.onnx.export lists all of its operators anew at each call and reads the source text of 497 functions for that;
# the functions are the same ones every time.
_signature_of = onnxscript.values.TracedOnnxFunction.function_ir.fget
onnxscript.values.TracedOnnxFunction.function_ir = property(functools.cache(_signature_of))


def pytest_collection_finish() -> None:
    """Modules live as long as the process: the collector need not walk through them again and again (0.3 s each time,
    a third of what an export took)."""
    gc.collect()
    gc.freeze()
