"""What an OpenVINO graph needs before it is compiled: norms that keep its layout, and parts that stay in float32.

Group norms: OpenVINO's own reads a picture plane by plane where convolutions keep its channels together, so the picture
is turned round before and after each: 60% of a float32 decoder's time and 24% of a bfloat16 one's. `norms_by_channel`
writes them as sums over each channel, which any layout can give.

Sines and cosines of times: a time rounded to eight bits of fraction is another time (999 becomes 1000), which makes the
denoiser's error five times larger. `split_head` cuts them off into a graph of its own.

Sums, and the rectifiers between them: they carry the residual stream, into which every block adds its share, so their
roundings pile up. `keep_sums` marks them; on the shipped decoder this takes a third off the largest error.
"""

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

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


def norms_by_channel(model: Any, least: int) -> int:
    """Rewrite group norms of pictures with at least `least` positions, in place; returns how many were.

    With m_c, v_c the mean and variance of a channel over its positions, a group's mean is `m = mean_c m_c` and its
    variance `v = mean_c (v_c + (m_c - m)^2)`: the same value, and no difference of large squares. A length that is not
    known counts as large.
    """
    found = 0
    for op in model.get_ordered_ops():
        if op.get_type_name() != "GroupNormalization":
            continue
        shape = op.get_input_partial_shape(0)
        lengths = [shape[k].get_length() if shape[k].is_static else None for k in range(1, len(shape))]
        if len(lengths) != 3 or lengths[0] is None or _positions(lengths[1:]) < least:
            continue
        output = op.output(0)
        readers = output.get_target_inputs()
        normed = _normed_by_channel(op, lengths[0])
        normed.set_friendly_name(op.get_friendly_name())
        for reader in readers:
            reader.replace_source_output(normed.output(0))
        found += 1
    return found


def _positions(lengths: list[int | None]) -> float:
    return math.prod(math.inf if length is None else length for length in lengths)


def _normed_by_channel(op: Any, channels: int) -> Any:
    """`op`, a group norm of [B, C, H, W], as channel sums."""
    from openvino import opset13 as ov

    def number(value: Any, kind: type = np.float32) -> Any:
        return ov.constant(np.asarray(value, dtype=kind))

    x, gamma, beta = (op.input_value(k) for k in range(3))
    groups = int(op.get_attributes()["num_groups"])
    places, rows, one = (
        number([2, 3], np.int64),
        number([0, groups, channels // groups, 1], np.int64),
        number(2, np.int64),
    )
    width = number([1, channels, 1, 1], np.int64)

    def mean_of_group(value: Any) -> Any:
        return ov.reduce_mean(ov.reshape(value, rows, True), one, True)

    def of_channels(value: Any) -> Any:
        spread = ov.multiply(value, number(np.ones((1, 1, channels // groups, 1))))
        return ov.reshape(spread, number([0, channels, 1, 1], np.int64), True)

    mean_c = ov.reduce_mean(x, places, True)
    size = ov.convert(
        ov.reduce_prod(ov.gather(ov.shape_of(x), places, number(0, np.int64)), number(0, np.int64), False), "f32"
    )
    length = ov.reduce_l2(ov.subtract(x, mean_c), places, True)
    mean = mean_of_group(mean_c)
    apart = ov.subtract(mean_c, of_channels(mean))
    variance = mean_of_group(ov.add(ov.divide(ov.multiply(length, length), size), ov.multiply(apart, apart)))
    inverse = ov.divide(number(1.0), ov.sqrt(ov.add(variance, number(op.get_attributes()["epsilon"]))))
    scale = ov.multiply(of_channels(inverse), ov.reshape(gamma, width, False))
    shift = ov.subtract(ov.reshape(beta, width, False), ov.multiply(of_channels(mean), scale))
    return ov.add(ov.multiply(x, scale), shift)


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
