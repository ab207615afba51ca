"""ONNX files: export, quantized forms, passes, and ONNX Runtime as a target."""
