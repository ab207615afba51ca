"""The arguments of a file's calls against the operators' schemas: every one of the type that the operator declares.

Kernels are given their arguments as they come: a dtype written as a plain number would reach them unchecked. So dtypes,
layouts, memory formats and devices are those that the file's tagged forms gave, never numbers, texts or results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from featherweight.errors import FileError
from featherweight.network.file.allowed import FUNCTIONS

LARGEST = 1 << 63  #: no integer is larger
_NUMBER = (Node, int, float)  # True and False are integers
#: type in a schema -> the types that an argument may have; what a node gives is checked when its shape is known
FORMS: dict[str, tuple[type, ...]] = {
    "Tensor": _NUMBER, "number": _NUMBER, "complex": _NUMBER, "float": _NUMBER, "SymFloat": _NUMBER,
    "int": (Node, int), "SymInt": (Node, int), "bool": (Node, int), "SymBool": (Node, int), "str": (str,),
    "ScalarType": (torch.dtype,), "Layout": (torch.layout,), "MemoryFormat": (torch.memory_format,),
    "Device": (torch.device,), "Generator": (),
}
#: Python function -> how many numbers it takes
COUNTS = {"operator.neg": 1, "math.ceil": 1, "math.floor": 1, "torch.sym_int": 1, "torch.sym_float": 1,
          "torch.sym_not": 1, "torch.sym_ite": 3}


def check(name: str, written: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises FileError unless the arguments of node ``name``, a call of ``target``, are of the declared types.

    written: the operator's name in the file."""
    if written in FUNCTIONS:
        _check_function(name, written, args, kwargs)
        return
    declared = target._schema.arguments
    places = [a.name for a in declared if not a.kwarg_only]
    given = dict(zip(places, args, strict=False))
    unknown = [k for k in kwargs if k not in {a.name for a in declared}] + [k for k in kwargs if k in given]
    if len(args) > len(places) or unknown:
        raise FileError(f"call {name!r} gives {written} {len(args)} arguments and {[k[:40] for k in kwargs][:20]}; "
                        f"expected {target._schema}")
    given |= kwargs
    for argument in declared:
        if argument.name not in given:
            if not argument.has_default_value():
                raise FileError(f"call {name!r} gives {written} no {argument.name!r}; expected {target._schema}")
        elif not _fits(given[argument.name], str(argument.real_type)):
            raise FileError(f"call {name!r} gives {written} {argument.name!r} as {_short(given[argument.name])}, which "
                            f"is no {argument.real_type}; expected {target._schema}, dtypes and their like in tagged "
                            'forms such as {"dtype": "float32"}')


def _fits(value: Any, declared: str) -> bool:
    """Whether a value is of a type as schemas write it, such as "Optional[List[int]]"."""
    outer, _, inner = declared.removesuffix("]").partition("[")
    if outer == "Optional":
        return value is None or _fits(value, inner)
    if outer == "List":
        items = value if isinstance(value, list) else [value]  # one number stands for as many as there are axes
        return all(_fits(item, inner) for item in items)
    if isinstance(value, int) and abs(value) >= LARGEST:
        return False
    return isinstance(value, FORMS.get(declared, ()))


def _check_function(name: str, written: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    picks = written == "operator.getitem"
    fits = all(_fits(a, "number") for a in args) and (not picks or _picks(args))
    if kwargs or len(args) != COUNTS.get(written, 2) or not fits:
        raise FileError(f"call {name!r} gives {written} {_short(list(args))}; expected "
                        f"{'a result of several and a place in it' if picks else f'{COUNTS.get(written, 2)} numbers'}")


def _picks(args: Sequence[Any]) -> bool:
    return len(args) == 2 and isinstance(args[0], Node) and type(args[1]) is int


def _short(value: Any) -> str:
    return repr(value)[:80]


__all__ = ["LARGEST", "check"]
