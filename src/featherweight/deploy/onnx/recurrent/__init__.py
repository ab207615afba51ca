"""Recurrent layers in ONNX: what its exporter or its runtimes lack of them."""
