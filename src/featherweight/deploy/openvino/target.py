"""OpenVINO: its own IR, an ``.xml`` file of the graph and a ``.bin`` file of the weights beside it; run on the CPU.

The IR is made from our ONNX form. OpenVINO computes float operators in bfloat16 on CPUs that have it, unless told
otherwise: the target "openvino" tells it to compute in float32, "openvino-bf16" in bfloat16.

As pairs of files can be torn apart, the graph carries the SHA-256 of its weights, and ``load`` looks at it. The graph's
metadata holds under "featherweight" how outputs are nested (as in ``deploy.onnx.file``).
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from featherweight.deploy.nest import feed, given, nested
from featherweight.deploy.onnx.file import METADATA, write
from featherweight.deploy.onnx.model import to_onnx
from featherweight.deploy.onnx.ready import computed_beforehand, unrounded
from featherweight.deploy.onnx.recurrent.projected import unprojected
from featherweight.deploy.onnx.weights import for_openvino
from featherweight.deploy.openvino.passes import OPENVINO
from featherweight.deploy.openvino.weights import narrow
from featherweight.deploy.processor import saturates
from featherweight.deploy.target import register
from featherweight.errors import ExportError, InputError
from featherweight.network import Network, Signature, fold_batch_norm

#: stands for the weights' SHA-256 until it is known
UNKNOWN = "0" * 64
SMALL = 64  #: bytes of a constant that is looked for twins
#: so many shapes of inputs get kernels of their own; all later ones share kernels for any shape (seen: 5 to 8 % slower)
SHAPES = 4


@dataclass(frozen=True)
class OpenVino:
    """The target "openvino", or with ``precision="bf16"`` "openvino-bf16".

    precision: what float operators are computed in, "f32" or "bf16" (on CPUs without bfloat16: float32 all the same;
    the runner says which). fp16_weights: store float weights in 16 bits; they are read back to ``precision``.
    """

    name: str = "openvino"
    suffix: str = ".xml"
    package: str = "openvino"
    precision: str = "f32"
    fp16_weights: bool = False

    def export(self, network: Network, path: str | Path) -> int:
        """Writes ``network`` as IR to ``path`` (``*.xml``) and ``*.bin``; gives the bytes of both.

        Raises ExportError naming operator and module, or where the path ends otherwise or OpenVINO is not installed.
        """
        openvino, whole = imported(), Path(path)
        if whole.suffix != self.suffix:
            raise ExportError(f"{whole} is to be an OpenVINO graph, which ends with .xml (its weights lie beside it, "
                              f"ending with .bin); write {whole.with_suffix(self.suffix)}")
        folded = fold_batch_norm(network).eval()
        for ready in (unrounded, unprojected, computed_beforehand):
            ready(folded)
        model, outputs = to_onnx(folded, OPENVINO, for_openvino)
        with tempfile.TemporaryDirectory(dir=whole.parent) as folder:
            source, graph = Path(folder, "network.onnx"), Path(folder, whole.name)
            write(model, None, source)
            read = _read(source)
            narrow(read)
            _share_constants(read)
            _tidy(read, model)
            read.set_rt_info(json.dumps({"outputs": outputs}, separators=(",", ":")), [METADATA, "outputs"])
            read.set_rt_info(UNKNOWN, [METADATA, "weights"])
            openvino.save_model(read, graph, compress_to_fp16=self.fp16_weights)
            del read
            digest = _digest(graph.with_suffix(".bin")).encode()
            graph.write_bytes(re.sub(rb"\n\t+", b"\n", graph.read_bytes()).replace(UNKNOWN.encode(), digest))
            for file in reversed(self.files(graph)):  # the graph last: until then the old one is found out by its sum
                file.replace(whole.with_suffix(file.suffix))
        return sum(file.stat().st_size for file in self.files(whole))

    def files(self, path: str | Path) -> tuple[Path, ...]:
        """Graph and weights."""
        return Path(path), Path(path).with_suffix(".bin")

    def load(self, path: str | Path, threads: int = 1, *, like: Signature) -> OpenVinoRunner:
        """The model made ready for the CPU with ``threads`` threads, for low latency of one call at a time."""
        openvino, (graph, weights) = imported(), self.files(path)
        for file in (graph, weights):
            if not file.is_file():
                raise ExportError(f"there is no file {file}: a network in OpenVINO is a pair of files, {graph.name} "
                                  f"and {weights.name}; export the network again")
        try:
            model = core().read_model(graph, weights)
        except Exception as error:
            raise ExportError(f"OpenVINO {openvino.__version__} does not load {path}: {_reason(error)}") from error
        if not model.has_rt_info([METADATA, "outputs"]) or not model.has_rt_info([METADATA, "weights"]):
            raise ExportError(f"{path} was not written by featherweight: it does not say how its outputs are nested; "
                              "export the network again")
        if model.get_rt_info([METADATA, "weights"]).astype(str) != _digest(weights):
            raise ExportError(f"{weights} does not hold the weights of {graph.name}: it is damaged, or of another "
                              "network; export the network again")
        outputs = json.loads(model.get_rt_info([METADATA, "outputs"]).astype(str))["outputs"]
        return OpenVinoRunner(model, threads, self.precision, like, outputs)


class OpenVinoRunner:
    """A model in OpenVINO called like the network: torch tensors in and out, in the network's nest.

    Kernels are chosen at the first call with inputs of a shape, which therefore takes longer (up to seconds).
    """

    def __init__(self, model: Any, threads: int, precision: str, like: Signature, outputs: list[Any]) -> None:
        self._model = model
        self._options = options(threads, precision)
        self._like = like
        self._outputs = outputs
        names = [o.get("tensor") or o.get("number") for o in outputs]
        self._names = list(dict.fromkeys(n for n in names if n is not None))
        known = {item.name for item in like.inputs}  # an input handed through has its output's name too
        self._shapes = {name: port.get_partial_shape() for port in model.inputs for name in port.get_names() & known}
        self._ready: dict[Any, Any] = {}

    @property
    def exact_sums(self) -> bool:
        return not saturates()

    @property
    def versions(self) -> Mapping[str, str]:
        return {"openvino": imported().__version__.partition("-")[0]}

    @property
    def precision(self) -> str:
        if not self._ready:
            return str(self._options["INFERENCE_PRECISION_HINT"])
        compiled = next(iter(self._ready.values())).get_compiled_model()
        return str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._model is None:
            raise ExportError("this runner was closed; load the file again")
        arrays = feed(self._like, self._shapes, args, kwargs)
        shapes = tuple(value.shape for value in arrays.values())
        request = self._ready.get(shapes) or self._prepared(shapes, arrays)
        try:
            results = request.infer(arrays, share_inputs=True)
        except Exception as error:
            raise InputError(f"OpenVINO refused the inputs ({given(arrays)}): {_reason(error)}") from error
        return nested(self._like, self._outputs, dict(zip(self._names, results.values(), strict=True)))

    def close(self) -> None:
        self._model = None
        self._ready.clear()

    def _prepared(self, shapes: tuple[Any, ...], arrays: Mapping[str, Any]) -> Any:
        """A request for inputs of these shapes."""
        openvino = imported()
        for name, value in arrays.items():
            if not self._shapes[name].compatible(openvino.PartialShape(list(value.shape))):
                raise InputError(f"OpenVINO refused the inputs ({given(arrays)}): the file takes {name} "
                                 f"{self._shapes[name]}")
        own = len(self._ready) < SHAPES
        key = shapes if own else None
        if key not in self._ready:
            try:
                self._ready[key] = self._compiled(arrays if own else None)
            except Exception as error:
                raise ExportError(f"OpenVINO {openvino.__version__} does not run the network on inputs "
                                  f"({given(arrays)}): {_reason(error)}") from error
        return self._ready[key]

    def _compiled(self, arrays: Mapping[str, Any] | None) -> Any:
        """A request for inputs of these shapes; of any, where OpenVINO fails at the shapes known (2026.4 does at a
        product of what they make a constant with stored integers)."""
        openvino = imported()
        if arrays is not None:
            with suppress(Exception):
                model = self._model.clone()
                model.reshape({name: openvino.PartialShape(list(v.shape)) for name, v in arrays.items()})
                return core().compile_model(model, "CPU", self._options).create_infer_request()
        return core().compile_model(self._model, "CPU", self._options).create_infer_request()


def options(threads: int, precision: str) -> dict[str, Any]:
    """How models are made ready. Threads are not tied to cores: other processes may run there."""
    return {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision, "ENABLE_CPU_PINNING": False}


def imported() -> Any:
    """OpenVINO's package. Raises ExportError where it is not installed."""
    try:
        import openvino
    except ImportError as error:
        raise ExportError(f"the target needs OpenVINO, which cannot be imported ({error}); write "
                          "pip install 'featherweight[openvino]'") from error
    return openvino


@cache
def core() -> Any:
    """OpenVINO's entry, made when it is used."""
    return imported().Core()


def _read(source: Path) -> Any:
    """Our ONNX form as OpenVINO's, constants computed and quantizers joined as OpenVINO's own converter does."""
    from openvino._offline_transformations import apply_moc_transformations

    try:
        model = core().read_model(source)
        apply_moc_transformations(model, cf=False)
    except Exception as error:
        raise ExportError(f"OpenVINO {imported().__version__} has no form of the network: {_reason(error)}") from error
    return model


def _tidy(model: Any, source: Any) -> None:
    """Names that OpenVINO counted up over the whole process become counts within the file, so that equal networks give
    equal bytes; names of inner tensors, which nobody asks for, go."""
    known = {n.name for n in source.graph} | set(source.graph.initializers)
    outputs = {v.name for v in source.graph.outputs}
    seen: Counter[str] = Counter()
    for operator in model.get_ordered_ops():
        kind, name = operator.get_type_name(), operator.get_friendly_name()
        if kind in ("Parameter", "Result"):
            continue
        if name.partition("/")[0] not in known:
            seen[kind] += 1
            operator.set_friendly_name(f"{kind}.{seen[kind]}")
        for port in operator.outputs():
            port.set_names(port.get_names() & outputs)


def _share_constants(model: Any) -> None:
    """One node for small constants that are equal, above all the ends of ranges: each takes 300 bytes of graph."""
    first: dict[Any, Any] = {}
    for operator in model.get_ordered_ops():
        if operator.get_type_name() == "Constant" and operator.get_byte_size() <= SMALL:
            key = str(operator.get_element_type()), str(operator.get_output_shape(0)), operator.get_data().tobytes()
            kept = first.setdefault(key, operator)
            if kept is not operator:
                for reader in list(operator.output(0).get_target_inputs()):
                    reader.replace_source_output(kept.output(0))


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    """The message without the places in OpenVINO's sources."""
    rows = [row.strip() for row in str(error).splitlines()]
    told = [row for row in rows if row and not row.startswith("Exception from ") and "src/" not in row[:20]]
    return " ".join(told or rows)[:600]


register(OpenVino())
register(OpenVino("openvino-bf16", precision="bf16"))
