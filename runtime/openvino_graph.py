"""What an OpenVINO graph needs before it may compute in bfloat16: two parts of it that stay in float32.

Sines and cosines of times: a time rounded to eight bits of fraction is another time (999 becomes 1000), which makes the
denoiser's error five times larger. `split_head` cuts them off into a graph of its own.

Sums, and the rectifiers between them: they carry the residual stream, into which every block adds its share, so their
roundings pile up. `keep_sums` marks them; on the shipped decoder this takes a third off the largest error.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

WAVE = "wave_{}"
SUMS = ("Add", "Relu")
_PRECISE = "precise_0"
"""OpenVINO's mark for "no lower precision here". It takes effect on graphs that were read from its own format."""


def keep_sums(core: Any, model: Any) -> Any:
    """`model` with its sums marked to stay in float32, as a new model.

    core: an `openvino.Core`. The graph passes through a temporary file of the size of its weights.
    """
    import openvino

    for op in model.get_ordered_ops():
        if op.get_type_name() in SUMS and op.get_output_element_type(0) == openvino.Type.f32:
            op.get_rt_info()[_PRECISE] = ""
    with TemporaryDirectory(prefix="fewstep-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "graph.xml"
        openvino.serialize(model, path)
        return core.read_model(path)  # maps the weights, which outlive the file's name


def split_head(model: Any) -> Any:
    """Cut every sine and cosine, and what they are taken of, off `model`, which gets them as inputs `wave_0`, ...

    Returns the cut part as a model of its own, with the waves as outputs in order, or None where there are none.
    """
    import openvino
    from openvino import opset13

    waves = [op for op in model.get_ordered_ops() if op.get_type_name() in ("Sin", "Cos")]
    if not waves:
        return None
    sources = {op.get_friendly_name() for wave in waves for op in _upstream(wave)}
    scalars = [p for p in model.get_parameters() if p.get_friendly_name() in sources]
    head = openvino.Model([wave.output(0) for wave in waves], scalars, "head").clone()
    for k, wave in enumerate(waves):
        name = WAVE.format(k)
        entry = opset13.parameter(wave.get_output_partial_shape(0), openvino.Type.f32, name=name)
        entry.output(0).set_names({name})
        for target in wave.output(0).get_target_inputs():
            target.replace_source_output(entry.output(0))
        model.add_parameters([entry])
    needed = {op.get_friendly_name() for result in model.get_results() for op in _upstream(result)}
    for scalar in scalars:
        if scalar.get_friendly_name() not in needed:
            model.remove_parameter(scalar)
    return head


def _upstream(op: Any) -> list[Any]:
    """An operation and all it is computed from."""
    found = {op.get_friendly_name(): op}
    queue = [op]
    while queue:
        for entry in queue.pop().inputs():
            source = entry.get_source_output().get_node()
            if source.get_friendly_name() not in found:
                found[source.get_friendly_name()] = source
                queue.append(source)
    return list(found.values())
