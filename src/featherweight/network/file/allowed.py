"""Which operators a file may name: those of a table, and with the caller's word those of a rule.

The table (``table.py``) is what capturing and our own steps give. A file that names another operator is read if the
caller of ``load`` names that operator too, and if the rule, read off the operator's registered schema, lets it through:
1. it is in one of NAMESPACES and known to torch's dispatcher (TorchScript's own, such as ``aten::save``, are not);
2. its arguments are tensors, numbers, flags, dtypes, layouts, devices, and texts named in TEXTS (never a file name, a
   storage, a stream or a custom class);
3. it writes into nothing, or is the in-place form ``name_`` and writes into its first argument alone (no ``out=``);
4. its name has no leading underscore, except those in PRIVATE;
5. its name is not in REFUSED and starts and ends with nothing in REFUSED_STARTS and REFUSED_ENDS: kernels that
   trust their arguments blindly, repoint memory, or change a tensor's size behind its views.
What a network may call when it is captured or saved follows the rule alone.

What stays possible: a graph that asks for more memory or time than there is. Run files of strangers under limits.
"""

from __future__ import annotations

import functools
import importlib
import math
import operator
from collections.abc import Collection, Iterable
from typing import Any

import torch

from featherweight.errors import FileError
from featherweight.network.file.table import PACKETS, TRUSTING

importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers quantized_decomposed

NAMESPACES = ("aten", "quantized_decomposed", "torchvision", "featherweight")
FUNCTIONS = {f"operator.{name}": getattr(operator, name) for name in (
    "getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge")}
FUNCTIONS |= {"math.ceil": math.ceil, "math.floor": math.floor, "torch.sym_int": torch.sym_int,
              "torch.sym_float": torch.sym_float, "torch.sym_max": torch.sym_max, "torch.sym_min": torch.sym_min,
              "torch.sym_not": torch.sym_not, "torch.sym_ite": torch.sym_ite}
FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}
#: names of text arguments that choose among ways of computing
TEXTS = {"UPLO", "activation", "approximate", "assert_msg", "center", "driver", "equation", "indexing", "interpolation",
         "mode", "norm", "ord", "p", "pad_mode", "padding", "padding_mode", "padding_side", "reduce", "rounding_mode",
         "side"}
TYPES = {"Tensor", "int", "bool", "float", "number", "complex", "Device", "Generator", "SymInt", "SymBool", "SymFloat",
         "ScalarType", "Layout", "MemoryFormat"}
PRIVATE = {
    "__and__", "__iand__", "__ilshift__", "__ior__", "__irshift__", "__ixor__", "__lshift__", "__or__", "__rshift__",
    "__xor__",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_assert_async", "_assert_scalar", "_assert_tensor_metadata",
    "_cdist_forward", "_conj", "_convolution", "_fft_c2c", "_fft_c2r", "_fft_r2c", "_log_softmax",
    "_native_batch_norm_legit_no_training", "_neg_view", "_scaled_dot_product_attention_math", "_softmax", "_stack",
    "_to_copy", "_trilinear", "_unsafe_view", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "_weight_norm",
    "_weight_norm_interface",
}
REFUSED = {"copy_sparse_to_sparse_", "data", "from_file", "record_stream", "rename", "requires_grad_", "resize",
           "retain_grad", "save", "segment_reduce", "set", "set_", "set_data", "squeeze_", "swapaxes_", "swapdims_",
           "t_", "transpose_", "unsqueeze_", "as_strided_", "lu_solve", "linalg_lu_solve", "linalg_ldl_solve", "ormqr",
           "lu_unpack"}
REFUSED_STARTS = ("resize_", "sparse_", "to_sparse", "nested_", "fbgemm_", "cudnn_", "miopen_", "mkldnn_",
                  "quantized_", "xnnpack_", "mps_", "rename_", "to_mkldnn", "set_")
REFUSED_ENDS = ("_backward", "_backward_data", "_unsafe", "_sparse")


def target_name(target: Any) -> str:
    """The name of an operator as files and tables have it: "aten.conv2d.default", "operator.getitem"."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if target in FUNCTION_NAMES:
        return FUNCTION_NAMES[target]
    raise FileError(f"the graph calls {target}, which a file cannot name; known: operators of {', '.join(NAMESPACES)} "
                    f"and {', '.join(FUNCTIONS)}")


def written(target: Any) -> str:
    """``target_name`` of an operator that a file may name. Raises FileError for any other."""
    name = target_name(target)
    if isinstance(target, torch._ops.OpOverload) and (reason := refusal(target)):
        raise FileError(f"the graph calls {name}, which a file may not name: {reason}")
    return name


def read(name: Any) -> Any:
    """The operator of this name. Raises FileError if there is none or a file may not name it."""
    if not isinstance(name, str):
        raise FileError(f"an operator is named by {str(name)[:80]!r}; expected a text such as 'aten.relu.default'")
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    if namespace not in NAMESPACES or "." in overload or not packet.isidentifier():
        raise FileError(f"the graph calls {name[:80]!r}; a file may call operators of {', '.join(NAMESPACES)} and "
                        f"{', '.join(FUNCTIONS)} only")
    known = _registered(f"{namespace}::{packet}", overload)
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None) if known else None
    if not isinstance(found, torch._ops.OpOverload):
        raise FileError(f"this torch ({torch.__version__}) has no operator {name[:80]!r}")
    if reason := refusal(found):
        raise FileError(f"the graph calls {name[:80]!r}, which a file may not name: {reason}")
    return found


def beyond(names: Iterable[str]) -> list[str]:
    """Those of the operators with these names that are not in the table."""
    return sorted({n for n in names if n not in FUNCTIONS
                   and ("::".join(n.split(".")[:2]) not in PACKETS or n in TRUSTING)})


def check_table(names: Collection[str], also: Collection[str]) -> None:
    """Raises FileError for operators that are neither in the table nor in ``also``, with the line to write instead."""
    if others := [n for n in beyond(names) if n not in also]:
        named = ", ".join(repr(n[:80]) for n in others[:20])
        raise FileError(f"the graph calls {named}, which a file may name only with your word: capturing gives no such "
                        "operators as a rule, and their kernels were not tried with hostile arguments. If you know who "
                        f"wrote the file, write fw.load(path, operators=[{named}])")


@functools.cache
def refusal(target: torch._ops.OpOverload) -> str:
    """Why a file may not name this operator; "" if it may."""
    schema = target._schema
    namespace, _, packet = schema.name.partition("::")
    if namespace not in NAMESPACES or not _registered(schema.name, target._overloadname):
        return f"it is none of the registered operators of {', '.join(NAMESPACES)}"
    if packet in REFUSED or packet.startswith(REFUSED_STARTS) or packet.endswith(REFUSED_ENDS):
        return "it trusts its arguments blindly or reaches behind its tensors"
    if packet.startswith("_") and packet not in PRIVATE:
        return "it is private to torch"
    for index, argument in enumerate(schema.arguments):
        kind = str(argument.type)
        while kind.startswith(("Optional[", "List[")):
            kind = kind.partition("[")[2].removesuffix("]")
        if not (kind in TYPES or (kind == "str" and argument.name in TEXTS)):
            return f"it takes {argument.name!r} of type {kind}"
        in_place = index == 0 and (packet.endswith("_") or packet.startswith("__i"))
        if argument.alias_info is not None and argument.alias_info.is_write and not in_place:
            return f"it writes into {argument.name!r}"
    return ""


def _registered(name: str, overload: str) -> bool:
    """Whether torch's dispatcher has an operator of this name and overload."""
    try:
        return torch._C._get_schema(name, "" if overload == "default" else overload) is not None and \
            torch._C._dispatch_has_kernel(name if overload == "default" else f"{name}.{overload}")
    except RuntimeError:
        return False
