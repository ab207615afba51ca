"""ONNX Runtime's own static quantizer, as the benchmarks set it beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from featherweight.deploy.onnx.onnxruntime import inference_session


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, inputs: list[Tensor]) -> None:
        self.left = iter([{name: x.numpy()} for x in inputs])

    def get_next(self) -> Any:
        return next(self.left, None)


def by_onnxruntime(source: Path, folder: Path, inputs: list[Tensor]) -> Path:
    """``quantize_static`` after its own preprocessing: per channel, QDQ, uint8 values, int8 weights."""
    prepared, quantized = folder / "prepared.onnx", folder / "theirs.onnx"
    quant_pre_process(str(source), str(prepared))
    name = inference_session(prepared, 1).get_inputs()[0].name
    quantize_static(str(prepared), str(quantized), Reader(name, inputs), quant_format=QuantFormat.QDQ, per_channel=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    return quantized
