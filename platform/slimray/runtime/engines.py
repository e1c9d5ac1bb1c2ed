"""Engines that run exports: ONNX Runtime, or OpenVINO if it is installed. `ENGINES` is the table."""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slimray.spec import UserError, did_you_mean

Session = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""Function of inputs by name, returning outputs by name."""


@dataclass(frozen=True)
class Engine:
    """A row of ENGINES: the `module` it needs, the `formats` it runs, and `open`, which makes a session from bytes and
    a number of threads (None: the engine's default)."""

    title: str
    module: str
    formats: frozenset[str]
    open: Callable[[bytes, int | None], Session]


def _onnxruntime(data: bytes, threads: int | None) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads or 0, 1
    options.log_severity_level = 4  # errors are raised as exceptions
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return lambda feeds: dict(zip(names, map(np.asarray, session.run(names, dict(feeds))), strict=True))


def _openvino(data: bytes, threads: int | None) -> Session:
    import openvino

    core = openvino.Core()
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(core.read_model(data), "CPU", settings)

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = compiled(dict(feeds))
        return {place.get_any_name(): np.array(found[place]) for place in compiled.outputs}

    return run


ENGINES: dict[str, Engine] = {
    "onnxruntime": Engine("ONNX Runtime", "onnxruntime", frozenset({"onnx", "onnx_int8"}), _onnxruntime),
    "openvino": Engine("OpenVINO", "openvino", frozenset({"onnx", "onnx_int8"}), _openvino),
}


def choose(format: str, name: str | None) -> str:
    """Return the engine `name`, or the first installed one that runs `format`; UserError if there is none."""
    fitting = {key: engine for key, engine in ENGINES.items() if format in engine.formats}
    if not fitting:
        formats = sorted({one for engine in ENGINES.values() for one in engine.formats})
        raise UserError(f"exports of format {format!r} cannot be run here: export the run as {' or '.join(formats)}")
    if name is not None and name not in fitting:
        raise UserError(f"unknown engine {name!r}{did_you_mean(name, fitting)} (available: {', '.join(fitting)})")
    there = [key for key, engine in fitting.items() if importlib.util.find_spec(engine.module) is not None]
    for key in there:
        if name in (None, key):
            return key
    missing = fitting[name] if name else next(iter(fitting.values()))
    raise UserError(f"{missing.title} is not installed here: pip install {missing.module}")


def version(name: str) -> str:
    """Return the version of an engine."""
    return importlib.metadata.version(ENGINES[name].module)
