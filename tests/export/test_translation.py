"""A translation network leaves torch as two graphs, and ONNX Runtime says token for token what torch says."""

import numpy as np
import pytest
import torch

from slimray import models
from slimray.data.text.vocabulary import EOS, PAD
from slimray.edge import onnx_file
from slimray.export import graph, translation
from slimray.models.text.decoding import greedy


def runner(data: bytes):
    session = onnx_file.open_session(data, 1)
    names = [one.name for one in session.get_outputs()]
    return lambda arrays: dict(zip(names, session.run(None, dict(arrays)), strict=True))


def exported(one: graph.Graph) -> bytes:
    return onnx_file.to_onnx(one.module, one.inputs, one.outputs, one.varying)


@pytest.mark.parametrize(
    "options",
    [{"attends": 2}, pytest.param({"pre_norm": True, "tied": False}, marks=pytest.mark.benchmark)],
)
def test_encoder_and_decoder_step_translate_token_for_token_as_torch_does(options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "embed": 16, "qkv": 16, "ffn": 24, "heads": 2, "encoder_layers": 2, "decoder_layers": 2}
    net = graph.ready(models.build("transformer", **sizes | options))
    with torch.no_grad():
        for name, value in net.named_parameters():
            if "proj" in name or "embed" in name:
                value.mul_(3)
    source = torch.randint(4, 11, (5, 7), generator=torch.Generator().manual_seed(1))
    for row in range(5):
        source[row, 6 - row] = EOS
        source[row, 7 - row :] = PAD
    graphs = [make(net, source[:2, :5]) for make in (translation.encoder_graph, translation.step_graph)]
    encode, step = (runner(exported(one)) for one in graphs)
    with torch.no_grad():
        outputs = graphs[1].module(*graphs[1].inputs.values())
    found = step({name: value.numpy() for name, value in graphs[1].inputs.items()})
    for name, wanted in zip(graphs[1].outputs, outputs, strict=True):
        assert np.allclose(found[name], wanted.numpy(), atol=1e-4), name
    expected = greedy(net, source, max_length=9)
    assert translation.translate(encode, step, source.numpy(), 16, max_length=9) == expected
    alone = [translation.translate(encode, step, row[row != PAD][None].numpy(), 16, max_length=9)[0] for row in source]
    assert alone == expected
    assert len({tuple(row) for row in expected}) > 1, "the source matters"
