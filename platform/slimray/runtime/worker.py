"""The process in which an agent computes: it holds checked networks, times chains of them, and can be killed.

Requests come only from the agent, over a socket (`slimray.data.child`): `load` a network under its SHA-256, `time`
chains of loaded ones on random input. Its address space is bounded, and it is killed if a request takes too long.
"""

import gc
import time
from typing import Any

import numpy as np

from slimray.data.child import Child, serve
from slimray.data.samples import BadSample
from slimray.runtime.engines import ENGINES, Session
from slimray.runtime.onnx_file import MAX_VALUES, check_onnx
from slimray.spec import UserError

ENGINE = "onnxruntime"


class Worker(Child):
    """The agent's side: sends requests to the process, and ends it if a response takes too long."""

    module, doing = "slimray.runtime.worker", "computing"

    def load(self, name: str, data: bytes, threads: int) -> None:
        """Load the network `name` for this number of threads. Raises BadSample."""
        self.refused.clear()  # a network may be tried again, because the device may have been busy
        self._ask(name, {"do": "load", "name": name, "threads": threads}, data)

    def time(self, request: dict[str, Any]) -> dict[str, Any]:
        """Time chains, see `_time`. Raises BadSample."""
        self.refused.clear()
        return self._ask("chain", {"do": "time", **request}, b"-")[0]


# ------------------------------------------------------------------------------------------- the process's side

_SESSIONS: dict[tuple[str, int], Session] = {}


def main() -> None:
    """Serve requests until the agent ends."""
    serve(_answer, "compute")


def _answer(request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    if request["do"] == "load":
        try:
            check_onnx(data, "the network")
        except UserError as error:
            raise BadSample(str(error)) from None
        _SESSIONS[request["name"], request["threads"]] = ENGINES[ENGINE].open(data, request["threads"])
        return {"loaded": True}, b""
    return _time(request), b""


def _time(request: dict[str, Any]) -> dict[str, Any]:
    """Run each of `chains` `skip` times untimed and `runs` times timed; return the ms of every step of every run.

    A step is a network's name and its inputs: name -> shape and type, or the name of the input that takes the output of
    the previous step. A single thread is timed by its processor time, several by wall time.
    """
    threads, rng, out = request["threads"], np.random.default_rng(0), []
    clock = time.thread_time if threads == 1 else time.perf_counter
    wall, busy = time.perf_counter(), time.thread_time()
    for chain in request["chains"]:
        steps = [(_SESSIONS[name, threads], _feeds(given, rng)) for name, given in chain["steps"]]
        gc.disable()
        rows = [_run(steps, clock) for _ in range(chain["skip"] + chain["runs"])][chain["skip"] :]
        gc.enable()
        out.append(rows)
    return {"ms": out, "wall_s": time.perf_counter() - wall, "busy_s": time.thread_time() - busy}


def _feeds(given: dict[str, Any] | str, rng: np.random.Generator) -> dict[str, np.ndarray] | str:
    """Return random inputs, or, for a step that takes the previous output, the name of its input."""
    if isinstance(given, str):
        return given
    feeds = {}
    for name, (shape, dtype) in given.items():
        if not all(isinstance(side, int) and side > 0 for side in shape) or np.prod(shape, dtype=object) > MAX_VALUES:
            raise BadSample(f"the input {name!r} cannot have the shape {shape}")
        kind = np.dtype(dtype)
        floats = rng.standard_normal(shape, np.float32) if kind.kind == "f" else np.zeros(shape)
        feeds[name] = floats.astype(kind)
    return feeds


def _run(steps: list[tuple[Session, Any]], clock: Any) -> list[float]:
    out, value = [], np.empty(0)
    start = clock()
    for session, feeds in steps:
        found = session({feeds: value} if isinstance(feeds, str) else feeds)
        value = next(iter(found.values()))
        end = clock()
        out.append(1e3 * (end - start))
        start = end
    return out


if __name__ == "__main__":
    main()
