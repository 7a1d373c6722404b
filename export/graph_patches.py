"""Mends of graphs as the exporter writes them: each changes an `onnx.ModelProto` in place, named by what it mends.

None changes what a graph computes as torch defines it; each says which reader refuses the graph without it.
"""

from collections.abc import Callable
from typing import Any


def mend(proto: Any) -> list[str]:
    """Every patch that applies, in order; the names of those that changed something."""
    return [patch.__name__ for patch in PATCHES if patch(proto)]


def squeeze_of_longer_axis_is_identity(proto: Any) -> int:
    """torch's `squeeze(dim)` leaves an axis that is longer than 1 as it is; ONNX calls such a Squeeze an error.

    Seen in PixArt, whose last block squeezes axis 1 of its tokens. ONNX Runtime and TensorRT refuse it.

    Returns how many nodes became an Identity.
    """
    import onnx

    suspects = [node for node in proto.graph.node if node.op_type == "Squeeze" and len(node.input) == 2]
    if not suspects:
        return 0
    shapes, constants = _shapes(proto), _constants(proto)
    changed = 0
    for node in suspects:
        shape, axes = shapes.get(node.input[0]), constants.get(node.input[1])
        if shape is None or axes is None:
            continue
        lengths = [shape[axis] for axis in axes.flatten().tolist()]
        if any(isinstance(length, int) and length > 1 for length in lengths):
            node.CopyFrom(onnx.helper.make_node("Identity", [node.input[0]], list(node.output), name=node.name))
            changed += 1
    return changed


def concat_of_mixed_floats_promotes(proto: Any) -> int:
    """torch's `cat` makes float32 of float32 and half precision; ONNX wants one type, and the exporter writes no Cast.

    Seen in SDXL in half precision, which joins the pooled text to the sines of its sizes. Returns how many inputs are
    cast.
    """
    from onnx import TensorProto, helper

    joins = [(k, node) for k, node in enumerate(proto.graph.node) if node.op_type == "Concat"]
    types = _types(proto) if joins else {}
    changed = 0
    for k, node in reversed(joins):
        if TensorProto.FLOAT not in map(types.get, node.input):
            continue
        for place, name in enumerate(node.input):
            if types.get(name) in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
                node.input[place] = f"{node.output[0]}_promoted_{place}"
                proto.graph.node.insert(k, helper.make_node("Cast", [name], [node.input[place]], to=TensorProto.FLOAT))
                changed += 1
    return changed


PATCHES: tuple[Callable[[Any], int], ...] = (squeeze_of_longer_axis_is_identity, concat_of_mixed_floats_promotes)


def _types(proto: Any) -> dict[str, int]:
    """Element types by tensor name: as the exporter noted them, or inferred where it noted none."""
    import onnx

    graph = proto.graph if proto.graph.value_info else onnx.shape_inference.infer_shapes(proto).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {weight.name: weight.data_type for weight in graph.initializer}


def _shapes(proto: Any) -> dict[str, list[int | str]]:
    """Shapes by tensor name, as far as they can be inferred; free axes by name."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(proto).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    axes = {value.name: value.type.tensor_type.shape.dim for value in values}
    return {
        name: [d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims] for name, dims in axes.items()
    }


def _constants(proto: Any) -> dict[str, Any]:
    """Constant integer tensors by name."""
    from onnx import numpy_helper

    integers = (6, 7)  # TensorProto.INT32, INT64
    found = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer if t.data_type in integers}
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return found
