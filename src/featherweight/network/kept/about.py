"""What a network is, in at most ten lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.fx import Graph, Node

from featherweight.network.signature import Signature, shape_text

#: inputs, operators that are named; the others are counted
MOST_INPUTS, MOST_KINDS = 4, 6


def about(graph: Graph, signature: Signature, tensors: Mapping[str, Tensor], notes: Sequence[str]) -> str:
    """Inputs, layers by operator, parameters and bytes, notes; and where more is to be had."""
    rows = ["Network"]
    for given in signature.inputs[:MOST_INPUTS]:
        rows.append(f"  input    {given.name}: {shape_text(given)}")
    if len(signature.inputs) > MOST_INPUTS:
        rows[-1] += f", and {len(signature.inputs) - MOST_INPUTS} more"
    calls = [node for node in graph.nodes if node.op == "call_function"]
    weighted = [node for node in calls if any(i.op == "get_attr" for i in node.all_input_nodes)]
    kinds = Counter(map(_name, weighted)).most_common()
    named = ", ".join(f"{count} {kind}" for kind, count in kinds[:MOST_KINDS])
    more = f", {sum(count for _, count in kinds[MOST_KINDS:])} others" if kinds[MOST_KINDS:] else ""
    rows.append(f"  layers   {named or 'none with tensors'}{more}; {len(calls)} operators")
    own = {id(t): t for t in tensors.values()}.values()
    trained = sum(t.numel() for t in own if t.requires_grad)
    rows.append(f"  params   {trained:,} trainable; {sum(t.nbytes for t in own):,} bytes of tensors")
    if notes:
        rows.append(f"  notes    {len(notes)}, in network.notes")
    rows.append("  MACs     fw.measure.macs(network); layer by layer: fw.measure.layers(network)")
    return "\n".join("".join(map(_shown, row)) for row in rows)


def _shown(character: str) -> str:
    """Names come from files of strangers: control characters are escaped."""
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _name(node: Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


__all__ = ["about"]
