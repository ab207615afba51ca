"""What this machine's processor does to sums of products of 8 bits."""

from __future__ import annotations

from functools import cache

import numpy as np

#: what to do where a file differs because of it
ADVICE = ("this processor has no VNNI instructions, and sums of products of uint8 and int8 saturate on it: write "
          "Quantize(device='any'), or Quantize(weights='int7', ends=None), whose sums fit, or measure on one that has "
          "them")


@cache
def saturates() -> bool:
    """Whether kernels add pairs of products of uint8 and int8 in 16 bits, and so cut off what does not fit: x86
    processors without VNNI instructions do. Asked of ONNX Runtime; OpenVINO does the same. Weights from -64 to 64 are
    never cut off, nor are those of ``Quantize(device="any")``.

    Example:
        >>> fw.deploy.saturates() in (True, False)
        True
    """
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    size = 64
    weight = helper.make_tensor("w", TensorProto.INT8, [size, size], np.full(size * size, 127, np.int8))
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "g",
                              [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, size])],
                              [helper.make_tensor_value_info("y", TensorProto.INT32, [1, size])], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((1, size), 255, np.uint8)})
    return bool((found != size * 255 * 127).any())


__all__ = ["ADVICE", "saturates"]
