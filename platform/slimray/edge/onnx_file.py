"""Converts a module to a single ONNX file of standard operators, and opens a session that runs it.

In: a module in eval mode and named example inputs. Out: the bytes of a file with the weights inside, without external
data, non-ONNX operators or paths of this machine. Axes that may vary (batch, points) have names. Uses torch's dynamo
exporter; surprising: the code traces that it writes into every node are removed, because they would be half of a small
file.
"""

import ast
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimray.spec import RunFailed, require_extra

OPSET = 20
LARGEST = 2**31  # larger upper bounds count as unlimited
MAX_BYTES = 2**31 - 1  # of one file without external data
Varying = Mapping[str, Mapping[int, str]]
"""Input -> axis -> name of the axis."""


def require(where: str) -> None:
    """Raise UserError, with `where`, if the libraries that write and run ONNX files are not installed."""
    require_extra("edge", where, "onnx", "onnxruntime", "onnxscript")


def output_names(outputs: Any) -> list[str]:
    """Return the names of a module's outputs: "output", or output_0 ... for several, or the keys of a dict."""
    if isinstance(outputs, Mapping):
        return list(outputs)
    if isinstance(outputs, Sequence):
        return [f"output_{number}" for number in range(len(outputs))]
    return ["output"]


def to_program(module: nn.Module, inputs: Mapping[str, Tensor], varying: Varying | None = None) -> Any:
    """Return `torch.export`'s program of a module in eval mode, with `inputs` in the order of its arguments.

    An axis of `varying` for which the program has an upper bound stays fixed, because its size changes what the network
    does. Raises RunFailed if the module cannot be exported.
    """
    varying = varying or {}
    example = {name: _twice(value, varying.get(name, {})) for name, value in inputs.items()}
    shapes = tuple(dict.fromkeys(varying.get(name, {}), torch.export.Dim.DYNAMIC) or None for name in inputs)
    with _quiet(), torch.no_grad():
        given = _by_argument(module, shapes) if any(shapes) else None
        try:
            program = torch.export.export(module, tuple(example.values()), dynamic_shapes=given)
        except Exception:  # noqa: BLE001  loops (scan) are compiled, and may hit state of an earlier export
            torch.compiler.reset()
            try:
                program = torch.export.export(module, tuple(example.values()), dynamic_shapes=given)
            except Exception as error:  # the exporter may raise anything
                raise RunFailed(f"torch.export: {_first_line(error)}") from error
    free = {
        name: {axis: called for axis, called in varying.get(name, {}).items() if _is_free(program, place, axis)}
        for place, name in enumerate(inputs)
    }
    cut = any(len(free[name]) < len(varying.get(name, {})) for name in inputs)
    return to_program(module, inputs, free) if cut else program


def _by_argument(module: nn.Module, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return `shapes` by argument, with those of `*arguments` grouped, because they are one argument."""
    kinds = [one.kind for one in inspect.signature(module.forward).parameters.values()]
    alone = sum(kind is not inspect.Parameter.VAR_POSITIONAL for kind in kinds)
    return shapes if alone == len(kinds) else (*shapes[:alone], shapes[alone:])


def _is_free(program: Any, place: int, axis: int) -> bool:
    """Return True if the size of an axis of the input at `place` has no upper bound in an exported program."""
    name = program.graph_signature.user_inputs[place]
    value = next(node.meta["val"] for node in program.graph.nodes if node.name == name)
    size = value.shape[axis]
    if isinstance(size, int):
        return False
    limits = program.range_constraints.get(size.node.expr)
    return limits is None or limits.upper > LARGEST


def _twice(value: Tensor, axes: Mapping[int, str]) -> Tensor:
    """Return `value` in C order with at least two along each of `axes`; the exporter takes a size of 1 as fixed."""
    for axis in axes:
        value = torch.cat([value, value], axis) if value.shape[axis] == 1 else value
    return value.contiguous()  # some runtimes (ExecuTorch) need arrays with the strides of the example


def to_onnx(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str] = ("output",),
    varying: Varying | None = None,
) -> bytes:
    """Return the ONNX file of a module in eval mode.

    `inputs` are examples in the order of its arguments, `outputs` the names of its flat outputs. Raises RunFailed if
    the module cannot be exported, or not with standard operators in a single file.
    """
    import onnx

    program = to_program(module, inputs, varying)
    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
        )
    assert exported is not None
    data = io.BytesIO()
    exported.save(data)  # pyright: ignore[reportArgumentType]  accepts a file object too
    model = onnx.load_from_string(data.getvalue())
    if foreign := sorted({one.domain for one in model.graph.node} - {"", "ai.onnx"}):
        raise RunFailed(f"onnx: the network needs operators that are not part of ONNX ({', '.join(foreign)})")
    _name_axes(model, varying or {})
    for number, node in enumerate(_nodes(model.graph)):
        if scope := _scope(node):
            node.name = f"{scope}/{node.op_type}_{number}"
        del node.metadata_props[:]
        node.ClearField("doc_string")
    for graph in _graphs(model.graph):
        del graph.value_info[:], graph.metadata_props[:]
        for value in (*graph.input, *graph.output):
            del value.metadata_props[:]
        for tensor in graph.initializer:
            del tensor.metadata_props[:]
    del model.metadata_props[:]
    if model.ByteSize() > MAX_BYTES:
        raise RunFailed(f"onnx: the network has {model.ByteSize():,} bytes, but a file holds at most {MAX_BYTES:,}")
    return model.SerializeToString()


def nodes_of(data: bytes, modules: Sequence[str]) -> list[str]:
    """Return the names of the nodes that belong to `modules` (names) in a file of `to_onnx`."""
    import onnx

    nodes = _nodes(onnx.load_from_string(data).graph) if modules else ()
    return [one.name for one in nodes if one.name.rpartition("/")[0] in modules]


def _scope(node: Any) -> str:
    """Return the module of a node: that of its weight, or else the one in its metadata; "" if neither is known.

    The metadata of a fused node name the last module that was fused.
    """
    weights = [name for name in node.input if name.endswith(".weight")]
    if weights:
        return weights[0].removesuffix(".weight")
    given = next((one.value for one in node.metadata_props if one.key == "pkg.torch.onnx.name_scopes"), "[]")
    names = [name for name in ast.literal_eval(given) if name]
    return names[-2] if len(names) > 1 else ""  # the last name is the node itself


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _nodes(graph: Any) -> Iterator[Any]:
    for one in _graphs(graph):
        yield from one.node


def _name_axes(model: Any, varying: Varying) -> None:
    """Replace the exporter's symbols (`s77`) by the names of their axes, also in outputs (`2*height`)."""
    symbols: dict[str, str] = {}
    for value in model.graph.input:
        for axis, name in varying.get(value.name, {}).items():
            dim = value.type.tensor_type.shape.dim[axis]
            if dim.dim_param:
                symbols[dim.dim_param] = name
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda found: symbols.get(found[0], found[0]), dim.dim_param)


def open_session(data: bytes, threads: int, optimised: bool = True) -> Any:
    """Return ONNX Runtime's CPU session of a file; without `optimised`, no operators are fused or replaced."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters, which report every optional library that is missing."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
