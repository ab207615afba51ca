"""ONNX Runtime: one ``.onnx`` file, weights inside, batch norms folded; run on the CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.deploy.nest import FLOAT32, feed, given, nested
from featherweight.deploy.onnx.file import METADATA, beside, write
from featherweight.deploy.onnx.model import to_onnx
from featherweight.deploy.onnx.passes import ONNX_RUNTIME
from featherweight.deploy.onnx.profile import profile
from featherweight.deploy.onnx.weights import for_onnx_runtime
from featherweight.deploy.processor import saturates
from featherweight.deploy.profile import PROFILERS
from featherweight.deploy.target import register
from featherweight.errors import ExportError, InputError
from featherweight.network import Network, Signature, fold_batch_norm

#: operators that ONNX Runtime 1.32 has no kernel of float64 for
NO_DOUBLES = {"Conv", "ConvTranspose", "InstanceNormalization", "Erf", "Gelu", "HardSigmoid", "Elu", "Softplus", "LSTM",
              "GRU", "RNN", "AveragePool", "GlobalAveragePool", "Resize", "PRelu", "LeakyRelu"}
#: the same of bfloat16, which it only moves about: most operators that compute
NO_BFLOATS = {*NO_DOUBLES, "Gemm", "MatMul", "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Relu", "Sigmoid", "Tanh",
              "Exp", "Sqrt", "Neg", "Abs", "Softmax", "ReduceMean", "ReduceMax", "Expand", "MaxPool"}


@dataclass(frozen=True)
class OnnxRuntime:
    """The target "onnxruntime"."""

    name: str = "onnxruntime"
    suffix: str = ".onnx"
    package: str = "onnxruntime"

    def export(self, network: Network, path: str | Path) -> int:
        """Writes ``network`` as ONNX; gives the bytes written. Raises ExportError naming operator and module."""
        model, outputs = to_onnx(fold_batch_norm(network).eval(), ONNX_RUNTIME, for_onnx_runtime)
        _check_kernels(model)
        return write(model, outputs, Path(path))

    def files(self, path: str | Path) -> tuple[Path, ...]:
        """The file itself, and the weights beside it where they are more than a message can hold."""
        return (Path(path), *beside(Path(path)))

    def load(self, path: str | Path, threads: int = 1, *, like: Signature) -> OnnxRunner:
        """A runner of the ``inference_session`` with ``threads`` threads. Raises ExportError where ONNX Runtime does
        not load the file, or another tool wrote it."""
        import onnxruntime

        try:
            session = inference_session(path, threads)
        except Exception as error:
            raise ExportError(f"ONNX Runtime {onnxruntime.__version__} does not load {path}: {error}") from error
        text = session.get_modelmeta().custom_metadata_map.get(METADATA)
        if text is None:
            raise ExportError(f"{path} was not written by featherweight: it does not say how its outputs are nested; "
                              "export the network again")
        return OnnxRunner(session, like, json.loads(text)["outputs"])


def _check_kernels(model: Any) -> None:
    """Raises ExportError for an operator that ONNX Runtime has no kernel of float64 or bfloat16 for."""
    import onnx_ir as ir

    without = {ir.DataType.DOUBLE: ("float64", NO_DOUBLES), ir.DataType.BFLOAT16: ("bfloat16", NO_BFLOATS)}
    for node in model.graph:
        for dtype in {v.dtype for v in node.inputs if v is not None} & without.keys():
            name, operators = without[dtype]
            if node.op_type in operators:
                raise ExportError(f"the network computes {node.op_type} ({node.name}) in {name}, for which ONNX "
                                  f"Runtime has no kernel; {FLOAT32}")


def inference_session(path: str | Path, threads: int) -> Any:
    """ONNX Runtime's session of any file, on the CPU with ``threads`` threads; all else as it comes, which is how
    files are opened where they are deployed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class OnnxRunner:
    """An ONNX Runtime session called like the network: torch tensors in and out, in the network's nest."""

    precision = "f32"

    def __init__(self, session: Any, like: Signature, outputs: list[Any]) -> None:
        self._session = session
        self._like = like
        self._outputs = outputs
        self._names = [o.name for o in session.get_outputs()]
        self._read = {i.name for i in session.get_inputs()}

    @property
    def exact_sums(self) -> bool:
        return not saturates()

    @property
    def versions(self) -> Mapping[str, str]:
        import onnx
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._session is None:
            raise ExportError("this runner was closed; load the file again")
        arrays = feed(self._like, self._read, args, kwargs)
        try:
            values = dict(zip(self._names, self._session.run(self._names, arrays), strict=True))
        except Exception as error:
            raise InputError(f"ONNX Runtime refused the inputs ({given(arrays)}): {error}") from error
        return nested(self._like, self._outputs, values)

    def close(self) -> None:
        self._session = None


PROFILERS[register(OnnxRuntime()).name] = profile
