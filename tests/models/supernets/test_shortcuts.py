"""Shortcuts are those of the released definition at every width, and what was stored before computes what it did.

Released: a block of a stage has a shortcut where its stride is 1 and it keeps its channels; ResNet-50D projects at the
first block of a stage and nowhere else; the first block of MobileNetV3 (16 -> 16) has one, that of ProxylessNAS
(32 -> 16) has none, where a width of 0.25 makes 8 of both too.
"""

from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from slimray import models, runs
from slimray.data.images.pictures import ImageRecipe
from slimray.edge import cost
from slimray.models.supernets.ofa_mobilenet import MBConv
from slimray.models.supernets.ofa_resnet import Bottleneck
from slimray.spec import UserError, parse
from slimray.tasks.network import load_network
from slimray.verbs import inputs, networks
from slimray.verbs.specs import TrainJob

WIDTHS = (0.125, 0.25, 0.35, 0.5, 1.0, 1.3)
NARROW = {"num_classes": 3, "width": 0.25}
PROXYLESS = ("ofa_proxyless", "proxyless_supernet", "proxyless_found", "proxyless_mobile")


def parts_of(name: str, width: float, **options: Any) -> list[Any]:
    """The parts of the largest arch of a supernet."""
    net: Any = cost.build_on_meta(lambda: models.build(name, num_classes=3, width=width, **options))
    return [placed.part for placed in net.layout.plan(net.space.largest())]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("name", "first"), [("ofa_mobilenetv3", True), ("ofa_tsm_mobilenetv3", True), ("ofa_proxyless", False)]
)
def test_the_first_block_has_a_shortcut_by_the_familys_definition_at_every_width(name, first, width):
    blocks = [part for part in parts_of(name, width) if isinstance(part, MBConv)]
    assert blocks[0].residual is first
    for block in blocks[1:]:
        assert block.residual is (block.stride == 1 and block.inputs == block.outputs)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["ofa_resnet50", "ofa_tsm_resnet50"])
def test_bottlenecks_project_at_the_first_of_a_stage_alone_at_every_width(name, width):
    projects = [part.projects for part in parts_of(name, width) if isinstance(part, Bottleneck)]
    assert projects == [i == 0 for depth in (4, 4, 6, 4) for i in range(depth)]


def test_the_tiny_preset_which_is_ours_keeps_its_shortcut_at_every_width():
    for width in WIDTHS:
        assert next(
            part for part in parts_of("ofa_proxyless", width, preset="tiny") if isinstance(part, MBConv)
        ).residual


def first_blocks(net: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the input of the first block, the output of its branch, and its output."""
    block: Any = net.get_submodule("blocks.0")
    torch.manual_seed(1)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        return x, block.eval().conv(x), block(x)


@pytest.mark.parametrize("name", PROXYLESS)
def test_a_narrow_net_adds_nothing_in_its_first_block_and_one_of_before_still_does(name):
    torch.manual_seed(0)
    x, branch, out = first_blocks(models.build(name, **NARROW))
    torch.testing.assert_close(out, branch, rtol=0, atol=0)
    x, branch, out = first_blocks(models.build(name, **NARROW, shortcuts="by_channels"))
    torch.testing.assert_close(out, x + branch, rtol=0, atol=0)
    assert branch.abs().max() > 0.1


def test_another_word_is_one_sentence():
    with pytest.raises(UserError, match=r"shortcuts: must be defined or by_channels \(got 'none'\)"):
        models.build("ofa_proxyless", **NARROW, shortcuts="none")


def test_measured_tables_keep_their_units_but_for_the_block_that_lost_its_shortcut():
    def key(**options: Any) -> str:
        net: Any = cost.build_on_meta(lambda: models.build("ofa_proxyless", num_classes=3, **options))
        return net.units(net.space.largest(), 224)[1].key

    ends = "-kernel:3-stride:1-act:relu6-se:0-expands:0-frames:0"
    assert key(width=1.3) == "MBConv-112x112-inputs:40-middle:40-outputs:24" + ends
    assert key(width=0.25, shortcuts="by_channels") == "MBConv-112x112-inputs:8-middle:8-outputs:8" + ends
    assert key(width=0.25) == key(width=0.25, shortcuts="by_channels") + "-shortcut:0"


# ------------------------------------------------------------------------------------------------- stored networks


def stored(folder: Any, model: dict[str, Any]) -> runs.Run:
    """A run with the network `model`, whose model.json is exactly that."""
    torch.manual_seed(0)
    run = runs.open_run(str(folder), "net")
    weights = safetensors.torch.save(models.build(**model).state_dict())
    taken = {"recipe": ImageRecipe(size=32).to_dict(), "pixels": {"average": "logits"}, "classes": ["a", "b", "c"]}
    runs.write_model(run, weights, model, taken)
    return run


@torch.no_grad()
@pytest.mark.parametrize("name", ["ofa_proxyless", "proxyless_found"])
def test_a_model_json_of_before_computes_what_it_did_and_a_new_one_what_the_definition_says(name, tmp_path):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    answers = {}
    for when, extra in (("before", {}), ("now", {"shortcuts": "defined"})):
        found = load_network(stored(tmp_path / when, {"name": name, **NARROW, **extra}))
        same = models.build(name, **NARROW, shortcuts="defined" if extra else "by_channels").eval()
        same.load_state_dict(found.net.state_dict())
        answers[when] = found.net(x)
        torch.testing.assert_close(answers[when], same(x), rtol=0, atol=0)
        said = inputs.read_model(runs.open_run(str(tmp_path / when), "net"), "run")
        assert said["shortcuts"] == ("defined" if extra else "by_channels")
    gap = (answers["before"] - answers["now"]).abs().max() / answers["now"].abs().max()
    assert gap > 0.01


def test_models_without_the_choice_are_read_as_they_are():
    for model in ({"name": "resnet18", "num_classes": 3}, {"name": "of another version"}):
        assert models.stored(model) == models.explicit(model) == model


def test_a_training_writes_what_shortcuts_its_network_has_unless_it_is_told():
    def options(**model: Any) -> dict[str, Any]:
        plain = {"kind": "train", "name": "net", "data": {"card": "my_images", "size": 32}, "model": model}
        plain |= {"batch": {"total": 8, "per_worker": 8}, "optim": {"lr": 0.1, "reference_batch": 8, "epochs": 1}}
        return networks.model_options(parse(TrainJob, plain, "x.yaml"), None)

    assert options(name="ofa_proxyless", width=0.25)["shortcuts"] == "defined"
    assert options(name="proxyless_found", shortcuts="by_channels")["shortcuts"] == "by_channels"
    assert "shortcuts" not in options(name="ofa_mobilenetv3")
