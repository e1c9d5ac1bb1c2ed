"""Hostile ONNX files: each is refused in one sentence before a library opens it, and no damage causes another error."""

import random
from contextlib import suppress

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slimray.runtime import onnx_file
from slimray.runtime.onnx_file import check_onnx
from slimray.spec import UserError


def model(nodes=None, weights=None, **options) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    weights = [numpy_helper.from_array(np.ones((4, 4), np.float32), "w")] if weights is None else weights
    graph = helper.make_graph(nodes or [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], **options)


def refused(data: bytes) -> str:
    with pytest.raises(UserError) as caught:
        check_onnx(data, "a.onnx")
    assert str(caught.value).startswith("a.onnx: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_ordinary_file_says_what_it_takes_and_gives():
    found = check_onnx(model().SerializeToString(), "a.onnx")
    assert [(one.name, one.dtype, one.shape) for one in found.inputs] == [("x", "float32", (None, 4))]
    assert [(one.name, one.shape) for one in found.outputs] == [("y", (None, 4))]
    assert found.num_nodes == 1


@pytest.mark.parametrize(
    "weight",
    [
        helper.make_tensor("w", TensorProto.FLOAT, [2, 2], [1, 2, 3, 4]),
        helper.make_tensor("w", TensorProto.INT64, [3], [1, 2, 3]),
        helper.make_tensor("w", TensorProto.INT32, [2], [-1, 2]),
        helper.make_tensor("w", TensorProto.FLOAT16, [2], [1.0, 2.0]),
        helper.make_tensor("w", TensorProto.DOUBLE, [2], [1.0, 2.0]),
        helper.make_tensor("w", TensorProto.UINT64, [2], [1, 2]),
        helper.make_tensor("w", TensorProto.STRING, [2], [b"a", b"b"]),
        helper.make_tensor("w", TensorProto.FLOAT, [0], []),
        helper.make_tensor("w", TensorProto.INT4, [3], [1, 2, 3]),
        numpy_helper.from_array(np.ones(5, np.int8), "w"),
        numpy_helper.from_array(np.array(3, np.int64), "w"),
    ],
    ids=lambda weight: f"{weight.data_type}-{'raw' if weight.HasField('raw_data') else 'typed'}",
)
def test_tensors_of_every_form_that_onnx_writes_pass(weight):
    check_onnx(
        model(weights=[numpy_helper.from_array(np.ones((4, 4), np.float32), "w"), weight]).SerializeToString(), "a"
    )


def with_weight(**fields) -> bytes:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], raw_data=bytes(64))
    weight.MergeFrom(TensorProto(**{k: v for k, v in fields.items() if k != "dims"}))
    if "dims" in fields:
        weight.ClearField("dims")
        weight.dims.extend(fields["dims"])
    return model(weights=[weight]).SerializeToString()


def external() -> bytes:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="/etc/passwd")
    return model(weights=[weight]).SerializeToString()


def of_domain(domain: str, kind: str) -> bytes:
    return model([helper.make_node(kind, ["x"], ["y"], domain=domain)]).SerializeToString()


def in_a_branch() -> bytes:
    weight = TensorProto(name="v", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    inner = helper.make_graph([helper.make_node("Constant", [], ["v"], value=weight)], "b", [], [])
    return model([helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)]).SerializeToString()


def wire(number: int, data: bytes) -> bytes:
    """Return a field of bytes."""
    size, out = len(data), bytearray([number << 3 | 2])
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    return bytes(out) + bytes([size]) + data


def nested(depth: int) -> bytes:
    """Return a nesting deeper than protobuf itself would write: a graph in an attribute of a node of a graph, ..."""
    graph = b""
    for _ in range(depth):
        graph = wire(1, wire(5, wire(6, graph)))
    return wire(8, b"") + wire(7, graph)


def sparse(*dims: int) -> bytes:
    """Return a constant that is a sparse tensor, whose dims are separate fields as ONNX writes them."""
    value = helper.make_attribute("sparse_value", onnx.SparseTensorProto(dims=dims))
    node = helper.make_node("Constant", [], ["v"])
    node.attribute.append(value)
    return model([node]).SerializeToString()


def packed(where: str, numbers: bytes) -> bytes:
    """Return a weight or a node with a packed field of integers: values or sides of a tensor, or an attribute."""
    if where == "ints":
        node = wire(1, b"x") + wire(2, b"y") + wire(4, b"Transpose") + wire(5, wire(1, b"perm") + wire(8, numbers))
        return wire(8, b"") + wire(7, wire(1, node))
    tensor = b"\x10\x06" + wire({"dims": 1, "int32_data": 5, "int64_data": 7, "uint64_data": 11}[where], numbers)
    return wire(8, b"") + wire(7, wire(5, tensor + wire(8, b"w")))


def blown_up(kind: str) -> bytes:
    size = numpy_helper.from_array(np.array([2**40, 4], np.int64), "size")
    node = helper.make_node(kind, ["size"] if kind == "ConstantOfShape" else ["x", "size"], ["y"])
    return model([node], [size]).SerializeToString()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty"),
        (b"no model", "is not an ONNX file"),
        (b"\x00" * 100, "is not an ONNX file"),
        (external(), "keeps weights in another file"),
        (in_a_branch(), "keeps weights in another file"),
        (of_domain("my.ops", "Evil"), "custom operator my.ops::Evil"),
        (of_domain("com.microsoft", "EPContext"), "opens a file"),
        (with_weight(dims=[2**40, 2**20]), "of 1,152,921,504,606,846,976 values, more than"),
        (with_weight(dims=[4, 5]), "declares a tensor of 20 values but holds 64 bytes of it"),
        (with_weight(dims=[-1, 4]), "of an impossible shape"),
        (with_weight(dims=[1] * 100), "of an impossible shape"),
        (with_weight(data_type=99), "of an unknown type"),
        (sparse(2**20, 2**20), "declares a sparse tensor of 1,099,511,627,776 values, more than"),
        (sparse(*[1] * 17), "declares a sparse tensor of an impossible shape"),
        (packed("dims", b"\x01" * 17), "declares a tensor of an impossible shape"),
        (packed("int32_data", b"\x01\x81"), "a number is incomplete"),
        (packed("int32_data", b"\x81" * 10 + b"\x01"), "a number is too long"),
        (packed("int32_data", b"\x81" * 30 + b"\x01"), "a number is too long"),
        (packed("int32_data", b"\x81\x01\x01"), "declares a tensor of 1 values but holds 2 values of it"),
        (nested(40), "nested too deeply"),
        (nested(2000), "nested too deeply"),
        (blown_up("ConstantOfShape"), "declares the output of ConstantOfShape"),
        (blown_up("Expand"), "declares the output of Expand"),
        (blown_up("Tile"), "declares the output of Tile"),
        (model().SerializeToString()[:-9], "is truncated"),
    ],
)  # fmt: skip
def test_a_hostile_file_is_refused_in_one_sentence(data, sentence):
    assert sentence in refused(data)


def test_a_function_that_the_file_defines_is_no_custom_operator():
    own = helper.make_function(
        "mine", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 20)]
    )
    node = helper.make_node("Twice", ["x"], ["y"], domain="mine")
    check_onnx(model([node], functions=[own]).SerializeToString(), "a.onnx")
    evil = helper.make_function(
        "mine", "Twice", ["a"], ["b"], [helper.make_node("Run", ["a"], ["b"], domain="other")],
        [helper.make_opsetid("other", 1)],
    )  # fmt: skip
    assert "custom operator other::Run" in refused(model([node], functions=[evil]).SerializeToString())


def test_no_damage_ends_in_anything_but_a_sentence():
    rng, whole = random.Random(0), external() + blown_up("Tile") + model().SerializeToString()
    for _ in range(3000):
        data = bytearray(whole[: rng.randrange(1, len(whole))])
        for _ in range(rng.randrange(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with suppress(UserError):
            check_onnx(bytes(data), "a.onnx")


@pytest.mark.parametrize("where", ["dims", "int32_data", "int64_data", "uint64_data", "ints"])
def test_a_long_packed_field_is_counted_and_not_decoded(monkeypatch, where):
    numbers, decoded = b"\xff\x01" * (1 << 21), 0  # two million, across the borders of the chunks that are counted
    data, one = packed(where, numbers), onnx_file._varint

    def counted(value: memoryview, at: int) -> tuple[int, int]:
        nonlocal decoded
        decoded += 1
        assert decoded < 200
        return one(value, at)

    monkeypatch.setattr(onnx_file, "_varint", counted)
    if where == "ints":
        assert check_onnx(data, "a.onnx").num_nodes == 1
    else:
        assert ("impossible shape" if where == "dims" else "holds 2,097,152 values of it") in refused(data)


def test_a_number_across_the_border_of_what_is_counted_at_once_is_one(monkeypatch):
    monkeypatch.setattr(onnx_file, "CHUNK_BYTES", 3)
    assert onnx_file._few_ints(memoryview(b"\x81\x81\x81\x81\x01\x02\x83\x01")) == (3, [2113665 + (1 << 28), 2, 131])
    assert "a number is too long" in refused(packed("int32_data", b"\x81" * 10 + b"\x01"))
