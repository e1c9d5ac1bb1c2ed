"""torch's compiler is not imported in a process that compiles nothing, and complete in one that does."""

import subprocess
import sys

import pytest
from tests.waits import patience

HEAD = """
import sys
import torch
from slimray.edge.compiler import without_compiler
net = torch.nn.Linear(2, 2)
def step():
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer.state_dict()
"""
BODIES = {
    "a training step leaves it out, in the block and behind it": """
with without_compiler():
    step()
    assert "torch._dynamo.eval_frame" not in sys.modules and "sympy" not in sys.modules
assert "torch._dynamo" not in sys.modules
assert not [one for one in vars(torch.optim.Optimizer).values() if hasattr(one, "__wrapped__")
            and hasattr(one.__wrapped__, "__dynamo_disable")]
step()
assert "torch._dynamo.eval_frame" in sys.modules
""",
    "what is compiled in the block is compiled": """
with without_compiler():
    step()
    compiled = torch.compile(net, backend="eager")
    assert torch.equal(compiled(torch.ones(1, 2)), net(torch.ones(1, 2)))
    config = sys.modules["torch._dynamo.config"]
    step()
import torch._dynamo.config
assert torch._dynamo.config is config and torch._dynamo.eval_frame.config is config
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
""",
    "a submodule that is imported in the block is imported once": """
with without_compiler():
    from torch._dynamo.backends.registry import list_backends
    import torch._dynamo.config as config
assert "eager" in list_backends(())
assert sys.modules["torch._dynamo"].config is config is sys.modules["torch._dynamo.eval_frame"].config
""",
    "where it is imported already nothing changes": """
import torch._dynamo as dynamo
with without_compiler():
    assert sys.modules["torch._dynamo"] is dynamo
    step()
assert sys.modules["torch._dynamo"] is dynamo
""",
}


@pytest.mark.parametrize("what", BODIES)
def test_the_compiler_is_imported_where_something_is_compiled(what):
    code = HEAD + BODIES[what]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=patience(120))
    assert done.returncode == 0, done.stderr
