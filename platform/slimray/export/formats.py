"""Export formats: `FORMATS` has a row for each, with its requirements, its converter and its runtime.

`convert(graph, folder, calibration)` writes the file into a local folder, `load(path, threads, optimised)` returns a
function of arrays in the order of the inputs. int8 is made by the format's own quantizer. TensorRT has no row, because
it converts the ONNX file on the device itself, which was not run here: `trtexec --onnx=model.onnx --fp16
--saveEngine=model.plan`, with `--minShapes=input:1x3x224x224` (and optShapes, maxShapes) for axes of any size.
"""

import importlib
import importlib.metadata
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slimray.edge import onnx_file
from slimray.edge.runtimes import cpu_flags
from slimray.export import slices
from slimray.export.graph import Graph
from slimray.spec import RunFailed, UserError, require_extra

Arrays = Sequence[np.ndarray]
Runner = Callable[[Arrays], list[np.ndarray]]
"""Function of arrays in the order of the inputs, returning arrays in the order of the outputs."""
CONVERT_S = 600  # time limit of an external converter
MATRIX_OPERATORS = ["Conv", "Gemm", "MatMul"]  # operators that gain from int8; indices and grids stay unchanged


@dataclass(frozen=True)
class Format:
    """A row of FORMATS. `varies`: batch and other axes may have any size, otherwise each sample is run by itself.

    `calibrated`: `convert` needs samples of the training split. export.json lists the versions of `libraries`.
    """

    description: str
    file: str
    extra: str | None
    modules: tuple[str, ...]
    convert: Callable[[Graph, Path, Sequence[Arrays]], None]
    load: Callable[[Path, int, bool], Runner]
    libraries: tuple[str, ...]
    varies: bool = True
    calibrated: bool = False
    optimises: bool = False
    """True if graph optimisations can be turned off, to see what they change."""
    stepwise: bool = False
    """True if it can hold an encoder and a step whose cache grows from length 0."""
    files: tuple[str, ...] = ()
    """Further files that belong to `file`."""
    converter: tuple[str, str] | None = None
    """A converter that cannot be installed beside slimray: its distribution, and the environment variable with the path
    to the Python of its own virtual environment."""

    @property
    def precision(self) -> str:
        """Precision of the weights: fp32 or int8."""
        return "int8" if self.calibrated else "fp32"

    def require(self, where: str) -> None:
        """Raise UserError, with `where`, if its libraries are not installed."""
        if self.extra is not None:
            require_extra(self.extra, where, *self.modules)
        if self.converter is not None:
            library, variable = self.converter
            if not Path(os.environ.get(variable, "")).is_file():
                raise UserError(
                    f"{where}: is converted by {library}, which needs an environment of its own: python -m venv "
                    f"~/{library}; ~/{library}/bin/pip install {library}; export {variable}=~/{library}/bin/python"
                )

    def versions(self) -> dict[str, str]:
        """Return the versions of the libraries that made the file."""
        return {name: importlib.metadata.version(name) for name in self.libraries}


# --------------------------------------------------------------------------------------------------- ONNX Runtime


def _to_onnx(graph: Graph, folder: Path, _: Sequence[Arrays]) -> None:
    data = onnx_file.to_onnx(graph.module, graph.inputs, graph.outputs, graph.varying)
    (folder / "model.onnx").write_bytes(data)


def _load_onnx(path: Path, threads: int, optimised: bool) -> Runner:
    session = onnx_file.open_session(path.read_bytes(), threads, optimised)
    names = [one.name for one in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def needs_reduced_range() -> bool:
    """Return True if int8 products saturate here: on x86 processors without VNNI, which add in 16 bits."""
    flags = cpu_flags()
    return "avx2" in flags and not {"avx512_vnni", "avx_vnni"} & set(flags)


def _to_onnx_int8(graph: Graph, folder: Path, calibration: Sequence[Arrays]) -> None:
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(calibration)

        def get_next(self) -> Any:
            arrays = next(self.left, None)
            return None if arrays is None else dict(zip(graph.inputs, arrays, strict=True))

    data = onnx_file.to_onnx(graph.module, graph.inputs, graph.outputs, graph.varying)
    plain = folder / "fp32.onnx"
    plain.write_bytes(data)
    logging.disable(logging.WARNING)  # it recommends a step that the exporter has already done
    try:
        quantization.quantize_static(
            plain,
            folder / "model.onnx",
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=MATRIX_OPERATORS,
            nodes_to_exclude=onnx_file.nodes_of(data, graph.floats),
            per_channel=True,
            reduce_range=needs_reduced_range(),
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    finally:
        logging.disable(logging.NOTSET)
    plain.unlink()


# ------------------------------------------------------------------------------------------------------- OpenVINO


def _to_openvino(graph: Graph, folder: Path, _: Sequence[Arrays]) -> None:
    import openvino

    _to_onnx(graph, folder, ())
    model = openvino.convert_model(folder / "model.onnx")
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
    (folder / "model.onnx").unlink()


def _load_openvino(path: Path, threads: int, _: bool) -> Runner:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    request = compiled.create_infer_request()

    def run(arrays: Arrays) -> list[np.ndarray]:
        found = request.infer(list(arrays))
        return [np.array(found[port]) for port in compiled.outputs]

    return run


# ----------------------------------------------------------------------------------------------------- ExecuTorch


def _to_executorch(graph: Graph, folder: Path, _: Sequence[Arrays]) -> None:
    _lower(_to_program(graph), folder)


def _to_program(graph: Graph) -> Any:
    """Return the program of a graph without operators that XNNPACK lacks."""
    return onnx_file.to_program(slices.sliced(graph.module, tuple(graph.inputs.values())), graph.inputs)


def _lower(program: Any, folder: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    config = EdgeCompileConfig(preserve_ops=[torch.ops.aten.topk.default])  # else a sort, which the runtime lacks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], compile_config=config)
        lowered = lowered.to_executorch()
    (folder / "model.pte").write_bytes(lowered.buffer)


def _to_executorch_int8(graph: Graph, folder: Path, calibration: Sequence[Arrays]) -> None:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.utils import get_module_name_filter

    program = _to_program(graph)
    module, example = program.module(), program.example_inputs[0]

    class Quantizer(XNNPACKQuantizer):  # the base class would quantize indices
        def transform_for_annotation(self, model: Any) -> Any:
            before = {node: node.args for node in model.graph.nodes if _is_whole(node)}
            model = super().transform_for_annotation(model)
            for node, arguments in before.items():
                node.args = arguments
            model.recompile()
            return model

        def annotate(self, model: Any) -> Any:
            model = super().annotate(model)
            if any(map(_is_whole, model.graph.nodes)):  # grids and distances determine indices: quantize products only
                for node in model.graph.nodes:
                    if getattr(node.target, "overloadpacket", None) not in kept:
                        node.meta.pop("quantization_annotation", None)
            return model

    aten = torch.ops.aten
    kept = {aten.conv1d, aten.conv2d, aten.linear, aten.relu, aten.relu_, aten.hardtanh, aten.hardtanh_}
    quantizer = Quantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    floats = [get_module_name_filter(name) for name in graph.floats]
    quantizer.set_filter_function(lambda node: not any(is_in(node) for is_in in floats))
    observed = prepare_pt2e(module, quantizer)
    with torch.no_grad():
        for arrays in calibration:
            observed(*(torch.from_numpy(array) for array in arrays))
    _lower(torch.export.export(convert_pt2e(observed), example), folder)


def _is_whole(node: Any) -> bool:
    """Return True if a node of a graph yields integers."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not value.is_floating_point()


def _load_executorch(path: Path, threads: int, _: bool) -> Runner:
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(threads)  # for the whole process: there is no other way to set it
    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    if method is None:
        raise RunFailed(f"{path.name}: has no method `forward`")

    def run(arrays: Arrays, program: Any = program) -> list[np.ndarray]:  # a method does not keep its program alive
        given = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]  # strides are ignored
        return [one.numpy().copy() for one in method.execute(given)]

    return run


# ------------------------------------------------------------------------------------------------------------ ncnn


NCNN_TRIED = """
import sys, numpy
from pathlib import Path
from slimray.export.formats import FORMATS
from slimray.spec import RunFailed
try:
    with numpy.load(sys.argv[2]) as arrays:
        FORMATS["ncnn"].load(Path(sys.argv[1]), 1, True)([arrays[name] for name in arrays])
except RunFailed as error:
    sys.exit(str(error))
"""


def _to_ncnn(graph: Graph, folder: Path, _: Sequence[Arrays]) -> None:
    """Convert a trace with pnnx. What ncnn cannot run may kill its process, so a child runs the example first."""
    import pnnx

    if any(value.ndim != 4 for value in graph.inputs.values()):
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in graph.inputs.items())
        raise RunFailed(f"ncnn has no batch axis: it takes pictures and the frames of online networks, not {shapes}")
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = tuple(value[:1] for value in graph.inputs.values())
        with torch.no_grad():
            traced: Any = torch.jit.trace(graph.module, inputs, check_trace=False)
        traced.save(f"{scratch}/model.pt")
        shapes = ",".join(str(list(value.shape)).replace(" ", "") for value in inputs)
        _call("pnnx", [pnnx.EXEC_PATH, "model.pt", f"inputshape={shapes}", "fp16=0"], scratch)
        for name in ("model.ncnn.param", "model.ncnn.bin"):
            if not Path(scratch, name).exists():
                raise RunFailed("pnnx wrote no network for ncnn: the network has an operator that ncnn lacks")
            shutil.copyfile(Path(scratch, name), folder / name)
        np.savez(f"{scratch}/example.npz", *(value.numpy() for value in inputs))
        _call("ncnn", [sys.executable, "-c", NCNN_TRIED, str(folder / "model.ncnn.param"), "example.npz"], scratch)


def _call(name: str, command: list[str], folder: str, **variables: str) -> None:
    """Run a program quietly; RunFailed, with its last error line or its first and last line, if it fails or hangs."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", timeout=CONVERT_S
        )
    except subprocess.TimeoutExpired:
        raise RunFailed(f"{name} did not end within {CONVERT_S} s") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        errors = [line.strip() for line in lines if "error:" in line.lower()]
        said = "; ".join(dict.fromkeys(errors[-1:] or [lines[0], lines[-1]]))
        raise RunFailed(f"{name} ended with status {done.returncode}: {said}")


def _load_ncnn(path: Path, threads: int, _: bool) -> Runner:
    ncnn: Any = importlib.import_module("ncnn")  # whose stubs are empty
    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.use_vulkan_compute = False
    net.opt.use_winograd63_convolution = False  # loses more than 1e-4 in a ResNet-50
    for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{name}", False)
    if net.load_param(str(path)) or net.load_model(str(path.with_suffix(".bin"))):
        raise RunFailed(f"{path.name}: ncnn cannot read it")
    inputs, outputs = (sorted(names(), key=lambda one: int(one.lstrip("inout"))) for names in
                       (net.input_names, net.output_names))  # fmt: skip

    def run(arrays: Arrays) -> list[np.ndarray]:
        extractor, out = net.create_extractor(), []
        for name, array in zip(inputs, arrays, strict=True):
            extractor.input(name, ncnn.Mat(np.ascontiguousarray(array[0])).clone())
        for name in outputs:
            status, found = extractor.extract(name)
            if status:
                raise RunFailed(f"{path.name}: ncnn ended with status {status} at {name}")
            out.append(np.array(found)[None])
        return out

    return run


# ---------------------------------------------------------------------------------------------------------- LiteRT


LITERT = ("litert-torch", "SLIMRAY_LITERT_PYTHON")
LITERT_CONVERTS = """
import litert_torch, torch
program = torch.export.load("model.pt2")
with torch.no_grad():
    litert_torch.convert(program.module(), program.example_inputs[0]).export("model.tflite")
"""


def _to_litert(graph: Graph, folder: Path, _: Sequence[Arrays]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        torch.export.save(onnx_file.to_program(graph.module, graph.inputs), f"{scratch}/model.pt2")
        python = str(Path(os.environ[LITERT[1]]).absolute())
        _call("litert-torch", [python, "-c", LITERT_CONVERTS], scratch, PYTHONPATH="")
        shutil.copyfile(Path(scratch, "model.tflite"), folder / "model.tflite")


def _load_litert(path: Path, threads: int, _: bool) -> Runner:
    from ai_edge_litert.interpreter import Interpreter

    signature = Interpreter(str(path), num_threads=threads).get_signature_runner()

    def in_order(names: Iterable[str]) -> list[str]:  # args_10 comes after args_9
        return sorted(names, key=lambda one: int(one.rpartition("_")[2]))

    inputs = in_order(signature.get_input_details())

    def run(arrays: Arrays) -> list[np.ndarray]:
        found = signature(**dict(zip(inputs, arrays, strict=True)))
        return [np.array(found[name]) for name in in_order(found)]

    return run


# ----------------------------------------------------------------------------------------------------------- torch


def _to_torch(graph: Graph, folder: Path, _: Sequence[Arrays]) -> None:
    torch.export.save(onnx_file.to_program(graph.module, graph.inputs, graph.varying), folder / "model.pt2")


def _load_torch(path: Path, threads: int, _: bool) -> Runner:
    module = torch.export.load(path).module()

    def run(arrays: Arrays) -> list[np.ndarray]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.no_grad():
                found = module(*(torch.from_numpy(array) for array in arrays))
        finally:
            torch.set_num_threads(before)
        parts = found.values() if isinstance(found, dict) else found if isinstance(found, tuple | list) else [found]
        return [one.numpy() for one in parts]

    return run


ONNX = ("onnx", "onnxruntime", "onnxscript")
FORMATS: dict[str, Format] = {
    "onnx": Format(
        "ONNX, run by ONNX Runtime", "model.onnx", "edge", ONNX, _to_onnx, _load_onnx, ("torch", *ONNX),
        optimises=True, stepwise=True,
    ),
    "onnx_int8": Format(
        "ONNX in int8 (QDQ, one scale per channel), run by ONNX Runtime",
        "model.onnx", "edge", ONNX, _to_onnx_int8, _load_onnx, ("torch", *ONNX), calibrated=True, optimises=True,
    ),
    "openvino": Format(
        "OpenVINO, by way of ONNX", "model.xml", "openvino", ("openvino", *ONNX), _to_openvino, _load_openvino,
        ("torch", "openvino", "onnx"), files=("model.bin",),
    ),
    "executorch": Format(
        "ExecuTorch with XNNPACK, for phones", "model.pte", "executorch", ("executorch",), _to_executorch,
        _load_executorch, ("torch", "executorch"), varies=False,
    ),
    "executorch_int8": Format(
        "ExecuTorch with XNNPACK in int8 (PT2E)", "model.pte", "executorch", ("executorch", "torchao"),
        _to_executorch_int8, _load_executorch, ("torch", "executorch", "torchao"), varies=False, calibrated=True,
    ),
    "ncnn": Format(
        "ncnn, for phones: pictures and frames of online networks", "model.ncnn.param", "ncnn", ("ncnn", "pnnx"),
        _to_ncnn, _load_ncnn, ("torch", "ncnn", "pnnx"), varies=False, files=("model.ncnn.bin",),
    ),
    "litert": Format(
        "LiteRT (TFLite)", "model.tflite", "litert", ("ai_edge_litert",), _to_litert, _load_litert,
        ("torch", "ai-edge-litert"), varies=False, converter=LITERT,
    ),
    "torch": Format("torch.export's .pt2, for PyTorch", "model.pt2", None, (), _to_torch, _load_torch, ("torch",)),
}  # fmt: skip
