"""A translation network is exported as two graphs, and ONNX Runtime agrees with torch token for token."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from tests.cli.test_cli import shell  # noqa: F401 a fixture
from tests.tasks.test_text_tasks import WORDS, network

from slimray import models, runs
from slimray.data.index import index_table
from slimray.data.text.samples import write_text_shard
from slimray.data.text.vocabulary import EOS, PAD
from slimray.edge import onnx_file
from slimray.export import exported, graph, translation
from slimray.models.text.decoding import beam_search, greedy
from slimray.runtime import translate
from slimray.runtime.inputs import Input
from slimray.runtime.loaded import load
from slimray.spec import UserError

SIZES = {"embed": 16, "qkv": 16, "ffn": 24, "heads": 2, "encoder_layers": 2, "decoder_layers": 2}


def lively(net: torch.nn.Module) -> torch.nn.Module:
    """Return `net` with larger weights, so that the translation depends on the source."""
    with torch.no_grad():
        for name, value in net.named_parameters():
            if "proj" in name or "embed" in name:
                value.mul_(3)
    return net


def runner(one: graph.Graph):
    session = onnx_file.open_session(onnx_file.to_onnx(one.module, one.inputs, one.outputs, one.varying), 1)
    return lambda arrays: session.run(None, dict(zip(one.inputs, arrays, strict=True)))


@pytest.mark.parametrize(
    "options",
    [{"attends": 2}, pytest.param({"pre_norm": True, "tied": False}, marks=pytest.mark.benchmark)],
)
def test_encoder_and_decoder_step_translate_token_for_token_as_torch_does(options):
    torch.manual_seed(0)
    net = graph.ready(lively(models.build("transformer", vocab_size=11, **SIZES | options)))
    source = torch.randint(4, 11, (5, 7), generator=torch.Generator().manual_seed(1))
    for row in range(5):
        source[row, 6 - row] = EOS
        source[row, 7 - row :] = PAD
    graphs = translation.graphs_of(net, source[:2, :5], "net")
    runners = {name: runner(one) for name, one in graphs.items()}
    with torch.no_grad():
        outputs = graphs["step"].module(*graphs["step"].inputs.values())
    found = runners["step"]([value.numpy() for value in graphs["step"].inputs.values()])
    for name, one, wanted in zip(graphs["step"].outputs, found, outputs, strict=True):
        assert np.allclose(one, wanted.numpy(), atol=1e-4), name
    speaker = translation.speaker(runners, *translation.ports_of(graphs))
    expected = greedy(net, source, max_length=9)
    said = translate.beam_search(speaker, source.numpy(), 1, 0.6, 9)
    assert [list(best[0].tokens) for best in said] == expected
    alone = [translate.beam_search(speaker, row[row != PAD][None].numpy(), 1, 0.6, 9)[0][0].tokens for row in source]
    assert [list(row) for row in alone] == expected
    assert len({tuple(row) for row in expected}) > 1, "the source matters"
    of_torch, outside = beam_search(net, source, 3, 1.0, 9), translate.beam_search(speaker, source.numpy(), 3, 1.0, 9)
    for one, other in zip(of_torch, outside, strict=True):
        assert [hypothesis.tokens for hypothesis in one] == [hypothesis.tokens for hypothesis in other]
        assert np.allclose([one.score for one in one], [one.score for one in other], atol=1e-4)
    again = translation.ExportedTranslation(speaker)
    assert beam_search(again, source, 3, 1.0, 9)[1][0].tokens == of_torch[1][0].tokens
    given = torch.cat([torch.full((5, 1), EOS), source[:, :-1]], 1)
    pairs = torch.stack([source, given], 1)
    with torch.no_grad():
        assert torch.allclose(again(pairs)[:, :3], net(pairs)[:, :3], atol=1e-4)


@pytest.fixture
def net(shell, tmp_path):  # noqa: F811
    """A finished run that holds a small network for a prepared dataset of twelve pairs."""
    rng, root = random.Random(0), tmp_path / "pairs"
    rows = []
    for number in range(12):
        sides = [rng.choices("abcde", k=rng.randint(1, 5)) for _ in range(2)]
        stored = {"tokens": WORDS.encode(" ".join(sides[0])), "target": WORDS.encode(" ".join(sides[1]))}
        stored |= {"text": " ".join(sides[0]), "translation": " ".join(sides[1])}
        rows.append({"path": f"t#{number}", "data": json.dumps(stored)})
    (root / "shards").mkdir(parents=True)
    write_text_shard(pafs.LocalFileSystem(), str(root / "shards/x.parquet"), rows)
    index = [{"path": f"t#{n}", "label": 0, "shard": "shards/x.parquet", "row": n, "frames": 6} for n in range(12)]
    for split in ("train", "val"):
        pq.write_table(index_table(index), root / f"{split}.parquet")
    text = {"tokenizer": WORDS.to_text(), "vocab_size": WORDS.size, "lengths": {"train": 6, "val": 6}}
    card = {"name": "letters", "layout": "index", "sample": "text", "labels": "none", "sides": 2, "task": "translate",
            "splits": {"train": "train.parquet", "val": "val.parquet"}, "text": text}  # fmt: skip
    found = network("translate", "transformer", 2, **SIZES | {"encoder_layers": 1, "decoder_layers": 1})
    run = runs.open_run("runs", "net")
    runs.begin(run, {"kind": "train", "name": "net", "data": {"card": card, "root": str(root)}}, 1)
    taken = {"recipe": found.recipe, "pixels": vars(Input()), "classes": [], "task": "translate"}
    runs.write_model(run, safetensors.torch.save(lively(found.net).state_dict()), found.model, taken)
    runs.end(run, "finished")
    return run


def test_an_export_translates_as_its_run_and_says_how_it_was_verified(shell, net, tmp_path):  # noqa: F811
    (tmp_path / "asked.txt").write_text("a b\nc a d e\n\ne\n")
    done = shell("export", "net", "--set", "samples=12", "--set", "pairs=9")
    assert done.code == 0, done.err
    assert "the same prediction 100.00 % of the time" in done.err
    run = runs.find_run("net-export", "runs")
    facts = exported.read_export(run, "onnx")
    assert (facts["file"], facts["step"]["file"]) == ("encoder.onnx", "step.onnx")
    assert facts["verification"]["passed"]
    assert facts["verification"]["agreement"] == 100
    assert facts["verification"]["metrics"]["perplexity"] == pytest.approx(facts["verification"]["torch"]["perplexity"])
    assert facts["inputs"] == [{"name": "source", "shape": [None, None], "dtype": "int64"}]
    said = shell("predict", "net-export", "asked.txt")
    assert said.code == 0, said.err
    assert said.out == shell("predict", "net", "asked.txt").out
    assert len(set(said.out.split("\n"))) > 2, "the source matters"
    folder = Path(run.uri) / "export/onnx"
    line = load(folder).line
    assert line is not None
    assert line("a b") == said.out.split("\n")[0]
    with pytest.raises(UserError, match="translates lines of text"):
        load(folder).outputs(np.zeros((1, 1, 2, 4), np.int32), 1)
    plain = json.loads((folder / "export.json").read_text())
    plain["step"]["inputs"][-1]["name"] = "past_other"
    (folder / "export.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match="step: does not match the encoder"):
        load(folder)
    (folder / "step.onnx").write_bytes(b"other")
    plain["step"]["file"] = "../step.onnx"
    (folder / "export.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match=r"step\.file: .* must be the name of a file"):
        load(folder)


def test_formats_that_hold_one_graph_are_refused_before_anything_is_done(shell, net):  # noqa: F811
    for arguments, said in (
        (["--format", "openvino"], "openvino cannot hold an encoder and a step"),
        (["--set", "online=true"], "is exported as an encoder and a step: leave it out"),
    ):
        done = shell("export", "net", *arguments)
        assert done.code == 2
        assert said in done.err
