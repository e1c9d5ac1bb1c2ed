"""The step `code`: write the network as one file, `model/model.slim`: codebooks, relative indices, Huffman codes."""

from typing import TYPE_CHECKING, Any

from slimray import runs
from slimray.verbs.compress_specs import CodeStep

if TYPE_CHECKING:
    from torch import nn

    from slimray.verbs.compressing import Work

FASTER = False  # a file is decoded once, then the network computes as before


def check(step: CodeStep, net: "nn.Module", sample: tuple[int, ...] | None) -> None:
    """Do nothing: the step works for every network."""


def run(step: CodeStep, work: "Work", folder: str, before: runs.Run) -> tuple[runs.Run, dict[str, Any]]:
    """Write the file beside the weights, which it encodes bit for bit; return the stage and the parts of the file."""
    import safetensors.torch

    from slimray.compress import slim_file

    def make(stage: runs.Run) -> None:
        weights, model, input_json = runs.read_model(before)
        runs.write_file(stage, "model/model.slim", slim_file.encode(safetensors.torch.load(weights), model, input_json))
        runs.write_model(stage, weights, model, input_json)

    stage = work.write(folder, step.model_dump(mode="json"), make)
    data = runs.read_file(stage, "model/model.slim")
    return stage, {"parts": slim_file.parts_of(slim_file.read_header(data, stage.uri), len(data))}
