"""torch's compiler, imported only where something is compiled; `compiled` compiles a network.

Optimizers, DDP and the operators of the meta device are Python functions that torch excludes from compilation: for that
the first call of each imports `torch._dynamo`, with sympy and more, which takes as long as importing torch itself.
"""

import contextlib
import importlib.abc
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from slimray.spec import RunFailed, UserError

NAME = "torch._dynamo"


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Keep torch from importing its compiler inside the block, as long as nothing in it is compiled.

    If it is not imported yet, a stand-in module takes its place and leaves functions unchanged: nothing is compiled, so
    nothing has to be excluded. Code that needs more than that gets the real module, which then stays.
    """
    if NAME in sys.modules:
        yield
        return
    stand_in = _StandIn()
    sys.modules[NAME] = torch._dynamo = stand_in  # type: ignore[attr-defined]
    sys.meta_path.insert(0, stand_in.finder)
    try:
        yield
    finally:
        stand_in.leave()
        sys.meta_path.remove(stand_in.finder)


def compiled(net: nn.Module | Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Return `net` with torch.compile: the same function and parameters, compiled at the first call.

    Raises UserError if the compiler for `device` is not installed; a call that cannot be compiled raises RunFailed.
    """
    _require_compiler(device)
    from torch._dynamo.exc import TorchDynamoException

    run = torch.compile(net)

    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return run(*arguments, **options)
        except TorchDynamoException as error:
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise RunFailed(f"scale.compile: torch cannot compile this network ({said[:200]}): remove it") from error

    return call


def _require_compiler(device: torch.device) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("scale.compile: needs triton, which is not installed here: pip install triton, or remove it")
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            "scale.compile: needs a C++ compiler, and none was found: install g++ on every node, or remove it"
        ) from None


class _StandIn(types.ModuleType):
    """Stand-in with the parts of `torch._dynamo` that torch uses when nothing is compiled."""

    def __init__(self) -> None:
        super().__init__(NAME)
        self.finder = _Finder()
        self.marked: list[Any] = []
        self.utils = types.SimpleNamespace(get_optimize_ddp_mode=lambda: "ddp_optimizer")  # torch's default
        self.trace_rules = types.SimpleNamespace(clear_lru_cache=lambda: None)  # called by process groups

    def disable(self, function: Any = None, recursive: bool = True, **options: Any) -> Any:
        if function is None or options.get("wrapping") is not False:  # not from torch's own wrapper
            return self.real().disable(function, recursive, **options)
        self.marked.append(function)
        return function

    def graph_break(self, *_: Any) -> None:
        """Do nothing; an optimizer would end a graph here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        return getattr(self.real(), name)

    def real(self) -> Any:
        """Import and return the compiler itself."""
        self.leave()
        return importlib.import_module(NAME)

    def leave(self) -> None:
        """Remove the stand-in, together with the marks that torch's wrapper left on functions."""
        if sys.modules.get(NAME) is self:
            del sys.modules[NAME], torch._dynamo  # type: ignore[attr-defined]
        while self.marked:
            vars(self.marked.pop()).pop("__dynamo_disable", None)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finder of submodules that the real compiler imported while one of them was imported through the stand-in."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        loaded = fullname.startswith(f"{NAME}.") and fullname in sys.modules
        return importlib.util.spec_from_loader(fullname, self) if loaded else None

    def create_module(self, spec: Any) -> Any:
        return sys.modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing, because the module has already been executed."""
