"""ONNX files: weights written one after another are those of the library's own message."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest

from featherweight.deploy.onnx.file import LARGE, METADATA, write

KINDS = {"float32": onnx_ir.DataType.FLOAT, "float16": onnx_ir.DataType.FLOAT16, "int8": onnx_ir.DataType.INT8,
         "int64": onnx_ir.DataType.INT64, "bool": onnx_ir.DataType.BOOL}


def model_of(weights: dict[str, onnx_ir.TensorProtocol]) -> onnx_ir.Model:
    """Hands every weight through."""
    values = [onnx_ir.Value(name=name, const_value=tensor) for name, tensor in weights.items()]
    nodes = [onnx_ir.node("Identity", [value], name=f"{value.name}_read") for value in values]
    for node, value in zip(nodes, values, strict=True):
        node.outputs[0].name = f"{value.name}_out"
        node.outputs[0].dtype, node.outputs[0].shape = value.const_value.dtype, value.const_value.shape
    graph = onnx_ir.Graph([], [node.outputs[0] for node in nodes], nodes=nodes, initializers=values,
                          opset_imports={"": 21}, name="graph")
    return onnx_ir.Model(graph, ir_version=10)


def tensor(kind: str, count: int) -> onnx_ir.Tensor:
    return onnx_ir.Tensor((np.arange(count) % 7).astype(kind), dtype=KINDS[kind])


@pytest.mark.parametrize("sizes", [(1, 2 * LARGE), (2 * LARGE, 1, 3 * LARGE), (), (5,), (LARGE, LARGE // 8)],
                         ids=lambda s: "_".join(map(str, s)) or "none")
def test_a_file_is_the_message_of_the_library(tmp_path, sizes):
    weights = {f"{kind}_{i}": tensor(kind, size) for kind in KINDS for i, size in enumerate(sizes)}
    model = model_of(weights)
    outputs = [{"tensor": "out"}]
    size = write(model, outputs, tmp_path / "a.onnx")
    whole = onnx_ir.to_proto(model)
    read = onnx.load(tmp_path / "a.onnx")
    assert size == (tmp_path / "a.onnx").stat().st_size
    assert {t.name: t for t in read.graph.initializer} == {t.name: t for t in whole.graph.initializer}
    assert len(read.graph.initializer) == len(weights)
    for one in (read, whole):
        one.graph.ClearField("initializer")
    assert read == whole
    assert [p.key for p in read.metadata_props] == [METADATA]
    if weights:
        onnx.checker.check_model(onnx.load(tmp_path / "a.onnx"))


def test_numbers_below_a_byte_text_and_late_ones(tmp_path):
    """Four bits are packed by two, text has no bytes of its own, and a late tensor is computed as it is written."""
    halves = onnx_ir.Tensor((np.arange(3 * LARGE) % 5).astype(np.int8), dtype=onnx_ir.DataType.INT4)
    text = onnx_ir.StringTensor(np.array([b"long " * LARGE, b"short"], dtype=object))
    late = onnx_ir.LazyTensor(lambda: tensor("float32", LARGE), dtype=onnx_ir.DataType.FLOAT,
                              shape=onnx_ir.Shape([LARGE]))
    raw = onnx_ir.serde.TensorProtoTensor(onnx.numpy_helper.from_array(np.arange(LARGE), "raw"))
    model = model_of({"halves": halves, "text": text, "late": late, "raw": raw})
    write(model, None, tmp_path / "a.onnx")
    read = {t.name: t for t in onnx.load(tmp_path / "a.onnx").graph.initializer}
    assert read == {t.name: t for t in onnx_ir.to_proto(model).graph.initializer}
    assert np.array_equal(onnx.numpy_helper.to_array(read["late"]), tensor("float32", LARGE).numpy())
