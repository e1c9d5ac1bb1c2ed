"""Quantized networks: folding, every row of MODELS, a fresh process, training, sensitivity; comparison with torchao."""

import copy
import json
import subprocess
import sys
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.waits import patience
from torch import Tensor, nn

from slimray import compress, models
from slimray.compress import quantization as q
from slimray.compress.fold import fold, norm_pairs
from slimray.compress.quantized import FakeQuantized, Quantized
from slimray.edge import cost
from slimray.models.tsm import Shift
from slimray.spec import UserError

OPTIONS = {"num_classes": 5, "num_shapes": 3, "width": 0.25, "scale": 2, "num_segments": 6}
OF_GENERATORS = {"scale": 2, "width": 16}
SHAPES = {"clip": (6, 3, 64, 64), "image": (3, 64, 64), "image_pair": (3, 24, 24)}


def options_of(name: str) -> dict[str, Any]:
    options = OF_GENERATORS if models.MODELS[name].input == "image_pair" else OPTIONS
    return {option: value for option, value in options.items() if option in models.options_of(name)}


def small(name: str) -> tuple[nn.Module, Tensor]:
    """Return a small network of MODELS in eval mode whose BatchNorms have seen data, and an input."""
    torch.manual_seed(0)
    net, takes = models.build(name, **options_of(name)), models.MODELS[name].input
    known = models.options_of(name)
    channels = known.get("in_channels", 6 + (OPTIONS["num_shapes"] if "num_shapes" in known else 0))
    shape = SHAPES.get(takes, (channels, 128))
    if takes == "image":
        shape = (known.get("in_channels", 3), *[known.get("side", 64)] * 2)
    x = torch.randn(4, *shape)
    return settled(net, x), x


@torch.no_grad()
def settled(net: nn.Module, x: Tensor) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    net.train()(x)
    return net.eval()


def plain(channels: int = 8) -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, channels, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 16, 3),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    return settled(net, torch.randn(4, 3, 16, 16))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------------------------------- folding


def test_folding_finds_the_pairs_and_keeps_the_answers():
    net, x = small("resnet20")
    pairs = norm_pairs(net, x)
    assert len(pairs) == 19
    assert pairs[0] == ("conv1", "bn1")
    with torch.no_grad():
        assert torch.allclose(fold(copy.deepcopy(net), pairs)(x), net(x), rtol=1e-4, atol=1e-5)


def test_a_layer_whose_output_goes_elsewhere_too_is_not_folded():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            out = self.a(x)
            return self.norm(out) + out

    assert norm_pairs(Both(), torch.randn(2, 3, 4, 4)) == []
    behind = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(4))
    assert norm_pairs(behind, torch.randn(2, 3, 4, 4)) == []


@pytest.mark.parametrize("answer", [lambda f, out: (f, out), lambda f, out: {"out": out, "all": [f]}])
def test_a_layer_whose_output_the_network_returns_is_not_folded(answer):
    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Any:
            out = self.a(x)
            return answer(out, self.norm(out))

    assert norm_pairs(Returned(), torch.randn(2, 3, 4, 4)) == []


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_network_that_is_not_float32_is_one_sentence(kind):
    net, x = plain().to(kind), torch.randn(4, 3, 16, 16, dtype=kind)
    reason = f"the layer 0 is {str(kind)[6:]}, not float32"
    for make in (compress.quantize, q.prepare):
        with pytest.raises(UserError, match=reason):
            make(net, x, [x])
    with pytest.raises(UserError, match=reason):
        q.sensitivity(net, x, [x], lambda _: 0.0)


# ---------------------------------------------------------------------------------------------- every network


HEAVY = {"unet3d_s3dis", "unet3d_shapenet", "tsm_resnet101", "tsn_resnet101", "tsn_resnet50", "tsn_resnet50_nl",
         "tsm_resnet50_nl", "i3d_resnet50_nl", "pvcnnpp_s3dis", "pointnetpp_msg_shapenet"}  # fmt: skip
ROWS = [
    pytest.param(name, marks=pytest.mark.benchmark) if name in HEAVY else name
    for name, row in models.MODELS.items()
    if not row.supernet and row.input in (*SHAPES, "points") and not name.startswith("proxyless_")
]  # those consist of the units of proxyless_mobile


@pytest.mark.parametrize("name", [*ROWS, "proxyless_mobile"])
def test_every_network_is_quantized_rebuilt_and_loaded_with_equal_bits(name):
    net, x = small(name)
    with torch.no_grad():
        made = compress.quantize(net, x, [x])
        record = json.loads(json.dumps(made.record))
        again = compress.rebuild(models.build(name, **options_of(name)), [record]).eval()
        again.load_state_dict(safetensors.torch.load(safetensors.torch.save(whole_state(made.net))))
        assert made.size_mb < 0.55 * made.size_mb_before
        assert torch.equal(first(again(x)), first(made.net(x)))
        require_near(made, net, x)
        on_meta = cost.build_on_meta(lambda: compress.rebuild(models.build(name, **options_of(name)), [record]))
    shapes = [{k: v.shape for k, v in one.state_dict().items()} for one in (on_meta, made.net)]
    assert shapes[0] == shapes[1]


def require_near(made: q.QuantizedNetwork, net: nn.Module, x: Tensor) -> None:
    """Each layer alone, on its inputs in the float network: half of them are 1 to 2 % away, a wrong grid is 100 %.

    Layers with few distinct inputs or small sums are further away, up to 11 % for a U-Net on voxels. The outputs of
    deep random networks are too rough to show anything.
    """
    folded = fold(copy.deepcopy(net), made.record["folded"])
    errors = {}

    def compare(name: str) -> Any:
        return lambda _, inputs, out: errors.update({name: relative(made.net.get_submodule(name)(inputs[0]), out)})

    for name in made.record["layers"]:
        folded.get_submodule(name).register_forward_hook(compare(name))
    folded(x)
    assert len(errors) == len(made.record["layers"]) >= 3
    assert sorted(errors.values())[len(errors) // 2] < 0.04, errors
    assert max(errors.values()) < 0.25, errors


def whole_state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone().contiguous() for name, value in net.state_dict().items()}


def first(out: object) -> Tensor:
    found = next(iter(out.values())) if isinstance(out, dict) else out
    assert isinstance(found, Tensor)
    return found


def test_a_fresh_process_answers_with_equal_bits(tmp_path):
    net, x = small("tsm_resnet18")
    made = compress.quantize(net, x, [x, torch.randn_like(x)], bits=(5, 8))
    with torch.no_grad():
        safetensors.torch.save_file({"x": x, "out": made.net(x)}, tmp_path / "pair.safetensors")
    safetensors.torch.save_file(whole_state(made.net), tmp_path / "weights.safetensors")
    (tmp_path / "record.json").write_text(json.dumps(made.record))
    code = f"""
import json, safetensors.torch as st, torch
from slimray import compress
record = json.load(open("record.json"))
net = compress.build("tsm_resnet18", compression=[record], num_classes=5, width=.25, num_segments=6)
net.eval().load_state_dict(st.load_file("weights.safetensors"))
torch.set_num_threads({torch.get_num_threads()})
pair = st.load_file("pair.safetensors")
with torch.no_grad():
    print(torch.equal(net(pair["x"]), pair["out"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=patience(120)
    )
    assert done.stdout.strip() == "True", done.stderr


def test_what_is_kept_of_inputs_is_bounded_and_a_fair_sample_of_all_batches():
    net, generator = nn.Linear(4, 2), torch.Generator().manual_seed(0)
    batches = [torch.rand(500, 4, generator=generator) + number for number in range(20)]
    found, again = (q.gather(net, {id(net): "all"}, batches, 1000)["all"] for _ in range(2))
    assert torch.equal(found, again)
    assert len(found) == 1002
    everything = torch.cat(batches)
    assert (found.min(), found.max()) == (everything.min(), everything.max())
    counts = torch.bincount(found[2:].long(), minlength=20)
    assert counts.sum() == 1000
    assert counts.min() > 20  # 50 of each batch are expected, with a deviation of 7
    assert counts.max() < 85
    few = q.gather(net, {id(net): "all"}, batches[:2], 10_000)["all"]
    assert torch.equal(few[2:].sort().values, torch.cat(batches[:2]).flatten().sort().values)


def test_ranges_of_eight_bits_keep_no_values_and_are_those_of_all_batches():
    net, batches = nn.Linear(4, 2), [torch.full((8, 4), float(number)) for number in (3, -2, 1)]
    assert q.observe(net, {"": (8, 8)}, batches, "int8")[""].tolist() == [-2, 3]
    assert len(q.gather(net, {id(net): ""}, batches, 0)[""]) == 2


# ------------------------------------------------------------------------------------------------------- the bits


def test_files_shrink_with_the_bits_and_size_counts_what_is_stored(tmp_path):
    net, x = plain(64), torch.randn(4, 3, 16, 16)
    sizes = []
    for bits in (8, 4, 2):
        made = compress.quantize(net, x, [x], bits={"3": (bits, 8)})
        safetensors.torch.save_file(whole_state(made.net), tmp_path / "w.safetensors")
        layer = made.net.get_submodule("3")
        assert isinstance(layer, Quantized)
        assert len(layer.codes) == 64 * 16 * 9 * bits // 8
        assert int(layer.whole().abs().max()) == 2 ** (bits - 1) - 1
        sizes.append((tmp_path / "w.safetensors").stat().st_size)
        assert 0 < sizes[-1] - 1e6 * made.size_mb < 2500, "names, shapes and a counter of BatchNorm"
    assert sizes[0] - sizes[1] == pytest.approx(64 * 16 * 9 // 2, abs=16), "headers are padded"
    assert sizes[1] - sizes[2] == pytest.approx(64 * 16 * 9 // 4, abs=16)


def test_parameters_and_macs_of_a_quantized_network_are_those_it_had():
    net, x = small("resnet20")
    made = compress.quantize(net, x, [x])
    folded = fold(copy.deepcopy(net), norm_pairs(net, x))
    assert cost.count_params(made.net) == cost.count_params(folded)
    assert cost.count_macs(made.net, (1, 3, 64, 64)) == cost.count_macs(net, (1, 3, 64, 64)) == made.macs


def test_ends_have_eight_bits_and_layers_that_are_kept_stay_float():
    net, x = plain(), torch.randn(4, 3, 16, 16)
    made = compress.quantize(net, x, [x], bits=(3, 4), keep=["3"])
    assert made.record["layers"] == {"0": [8, 8], "7": [8, 8]}
    assert isinstance(made.net.get_submodule("3"), nn.Conv2d)
    book = compress.quantize(net, x, [x], bits=3, scheme="kmeans")
    assert book.record["layers"] == {name: [3, None] for name in ("0", "3", "7")}
    layer = book.net.get_submodule("3")
    assert isinstance(layer, Quantized)
    assert len(layer.weight.unique()) <= 8


def test_the_input_is_left_as_it_is_and_the_gain_is_told():
    net, x = plain(), torch.randn(4, 3, 16, 16)
    before = copy.deepcopy(net.state_dict())
    said = str(compress.quantize(net, x))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert "MACs as before" in said
    assert "latency not measured" in said
    assert "give calibration samples" in said


def test_a_network_of_several_inputs_takes_tuples_and_one_batch_is_enough():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.rnn = nn.Conv1d(3, 4, 3), nn.Linear(5, 4), nn.GRU(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.rnn(self.a(x).mean(-1) + self.b(y))[0]

    net, example = Two(), (torch.randn(4, 3, 8), torch.randn(4, 5))
    one, other = (compress.quantize(net, example, given) for given in (example, [example]))
    assert torch.equal(one.net(*example), other.net(*example))
    assert one.macs == 3 * 4 * 3 * 6 + 5 * 4
    assert "still float: rnn (GRU, 96 weights)" in str(one)
    x = torch.randn(8, 3, 16, 16)
    assert q.sensitivity(plain(), x, x, lambda _: 0.0)[0].loss == 0.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 1}, r"all layers: bits must be \[weights 2 to 8, inputs 2 to 8 or null\] \(got \(1, 1\)\)"),
        ({"bits": {"0": (9, 8)}}, "0: bits must be"),
        ({"bits": {"4": (8, 8)}}, "no layer '4' that can be quantized"),
        ({"keep": ["nothing"]}, "no layer 'nothing'"),
        ({"calibration": []}, "there are no calibration samples"),
        ({"calibration": [torch.full((1, 3, 16, 16), float("nan"))]}, "the input of 0 is not finite"),
    ],
)
def test_what_cannot_be_quantized_is_one_sentence(options, said):
    x = torch.randn(4, 3, 16, 16)
    with pytest.raises(UserError, match=said):
        compress.quantize(plain(), x, **{"calibration": [x], **options})


def test_a_network_without_layers_is_refused():
    with pytest.raises(UserError, match="ReLU has no convolution or linear layer"):
        compress.quantize(nn.ReLU(), torch.randn(1, 3))


@pytest.mark.parametrize(
    "change",
    [{"scheme": "int9"}, {"form": "half"}, {"layers": {"0": [9, 9]}}, {"layers": {"nowhere": [8, 8]}},
     {"folded": [["0", "3"]]}, {"layers": {"2": [8, 8]}}, {"layers": 3}],
)  # fmt: skip
def test_a_hostile_record_is_refused_with_a_sentence(change):
    x = torch.randn(4, 3, 16, 16)
    record = compress.quantize(plain(), x, [x]).record
    with pytest.raises(UserError):
        compress.rebuild(plain(), [{**record, **change}])


# --------------------------------------------------------------------------------------------------------- shift


def test_inputs_rounded_behind_a_shift_are_those_rounded_in_front_of_it():
    """So one scale serves the tensors around the shift, and an int8 shift copies bytes."""
    net, x = small("tsm_resnet18")
    made = compress.quantize(net, x, [x])
    shifts = [m for m in made.net.modules() if isinstance(m, Shift)]
    assert len(shifts) == 8
    for shift in shifts:
        assert isinstance(shift.net, Quantized)
        layer, seen = shift.net, torch.randn(6, shift.net.geometry.shape[1], 7, 7)
        moved = copy.deepcopy(shift)
        moved.net = nn.Identity()
        with torch.no_grad():
            assert torch.equal(layer.rounded(moved(seen)), moved(layer.rounded(seen)))


# ------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("scheme", ["int8", "linear"])
def test_training_with_rounding_learns_and_its_whole_numbers_answer_with_equal_bits(scheme):
    torch.manual_seed(0)
    x, y = torch.randn(64, 3, 16, 16), torch.randint(0, 4, (64,))
    net, record = q.prepare(plain(), x[:2], [x], bits=(3, 4), scheme=scheme)
    assert all(isinstance(net.get_submodule(name), FakeQuantized) for name in record["layers"])
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9)
    ranges = [layer.input_range.detach().clone() for layer in net.modules() if isinstance(layer, FakeQuantized)]
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    moved = [layer.input_range for layer in net.modules() if isinstance(layer, FakeQuantized)]
    assert any(not torch.equal(a, b) for a, b in zip(moved, ranges, strict=True)), "ranges are learned"
    made, whole = q.finish(net.eval(), record)
    with torch.no_grad():
        assert torch.equal(made(x), net(x))
    again = compress.rebuild(plain(), [whole]).eval()
    again.load_state_dict(made.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
    trained = compress.rebuild(plain(), [record]).eval()
    trained.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(trained(x), net(x))


# --------------------------------------------------------------------------------------------------- sensitivity


def test_sensitivity_names_the_layer_that_cannot_be_rounded():
    net, x = plain(), torch.randn(64, 3, 16, 16)
    with torch.no_grad():
        net.get_submodule("1").bias[0] = -100.0  # a channel that ReLU silences,
        weight = net.get_submodule("3").weight
        weight[0, 0, 0, 0] = 50 * weight.abs().max()  # and a large weight on it, of which 5 bits leave nothing else
        expected = net(x)
        rows = compress.sensitivity(net, x[:2], [x], lambda one: -100 * relative(one(x), expected), (5, 8), "linear")
    assert len(rows) == 3
    assert rows[0].layer == "3"
    assert rows[0].loss > 10 + rows[1].loss
    assert rows[0].saved_mb > 0


# ------------------------------------------------------------------------------------------------ second opinion


def test_torchaos_graph_quantization_is_as_far_from_the_float_network():
    """PT2E with the quantizer of x86 CPUs, same samples: both errors are of similar size, so our scales are right."""
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    net, x = plain(16), torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        ours = compress.quantize(net, x, [x]).net(x)
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        graph = prepare_pt2e(torch.export.export(net, (x,)).module(), quantizer)
        graph(x)
        theirs, expected = convert_pt2e(graph)(x), net(x)
    assert 0 < relative(ours, expected) < 2 * relative(theirs, expected)
    assert relative(theirs, expected) < 0.1


@pytest.mark.parametrize(
    ("scheme", "bits", "kept"),
    [("int8", [3], False), ("kmeans", [3], False), ("linear", [8, 5], False), ("linear", [8, 4], True)],
)
def test_ranges_are_found_on_values_only_where_their_ends_do_not_say_them(scheme, bits, kept):
    assert q.kept_values(scheme, bits) == (q.KEPT_VALUES if kept else 0)
