"""From ONNX to Relax: dimensions and their names, shapes as values."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_model import X, model, run

import opferry
from opferry.frontend.model import name_dimensions
from opferry.reference.whole_model import evaluator
from opferry.runtime.errors import InvalidModelError

# Dimensions


def test_symbolic_dimensions_stay_symbolic():
    module = opferry.compile(model("g (float[b,c] x) => (float[b,c] y) { y = Relu(x) }"))
    assert module.inputs[0].shape == ("b", "c")
    for shape in [(1, 1), (5, 2), (3, 7)]:
        assert module.run({"x": np.ones(shape, np.float32)})["y"].shape == shape


@pytest.mark.parametrize(
    ("shapes", "want"),
    [
        ({"b": 2}, (2, "c")),
        ({"c": np.int64(3), "b": 2}, (2, 3)),
        ({"x": (2, None)}, (2, "c")),
        ({"x": ("b", 3)}, ("b", 3)),
        ({"x": [2, 3], "b": 2}, (2, 3)),
    ],
    ids=str,
)
def test_shapes_bind_dimensions(shapes, want):
    proto = model("g (float[b,c] x) => (float[b,c] y) { y = Relu(x) }")
    assert opferry.compile(proto, shapes=shapes).inputs[0].shape == want
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "b"  # left as it was


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q": 1}, r"shapes: found 'q', allowed inputs \['x'\] or dimensions \['b', 'c'\]"),
        ({"x": (2,)}, r'input "x": found \(2,\), allowed 3 dimensions'),
        ({"x": 2}, 'input "x": found 2, allowed 3 dimensions'),
        ({"x": (2, 3, 9)}, "axis 2: found 9, allowed 8, which the model fixes"),
        ({"b": 0}, "dimension 'b': found 0, allowed a size of at least 1"),
        ({"b": 2**63}, "dimension 'b': found 9223372036854775808, allowed a size"),
        ({"b": 2.5}, "dimension 'b': found 2.5, allowed a size"),
        ({"b": "two"}, "dimension 'b': found 'two', allowed a size"),
        ({"x": ("B", 3, 8)}, "axis 0: found 'B', allowed a size"),
        ({"b": 1, "x": (2, 3, 8)}, "dimension 'b': found 1 and 2, allowed one size"),
        ([("b", 1)], "shapes: found .*, allowed a mapping"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    proto = model("g (float[b,c,8] x) => (float[b,c,8] y) { y = Relu(x) }")
    with pytest.raises(InvalidModelError, match=message):
        opferry.compile(proto, shapes=shapes)


def test_unnamed_and_oddly_named_dimensions_become_identifiers():
    proto = model("g (float[?,2] x, float[b,2] z) => (float[?,2] y) { y = Relu(x) }")
    dims = [proto.graph.input[i].type.tensor_type.shape.dim[0] for i in (0, 1)]
    dims[1].dim_param = "batch size"
    assert name_dimensions(proto.graph) == {"x.0": "x_0", "batch size": "batch_size"}
    dims[1].dim_param = "batch size"
    module = opferry.compile(proto, shapes={"batch size": 4})
    assert [spec.shape for spec in module.inputs] == [("x_0", 2), (4, 2)]


def test_two_dimensions_keep_two_names():
    proto = model("g (float[a] x, float[b] z) => (float[a] y) { y = Relu(x) }")
    for value, name in zip(proto.graph.input, ("n-1", "n.1")):
        value.type.tensor_type.shape.dim[0].dim_param = name
    assert name_dimensions(proto.graph) == {"n-1": "n_1", "n.1": "n_1_"}


def test_outputs_have_the_names_of_the_inputs_dimensions():
    text = "g (float[T,R] x, float[I,R] z) => (float[n,R] y) { y = Concat<axis=0>(x, z) }"
    module = opferry.compile(model(text))
    assert [spec.shape for spec in module.outputs] == [("T + I", "R")]


def test_an_unnamed_dimension_can_be_named():
    proto = model("g (float[?,?] x) => (float[?,?] y) { y = Relu(x) }")
    assert opferry.compile(proto, shapes={"x": ("b", 3)}).inputs[0].shape == ("b", 3)


def test_an_input_without_a_rank_needs_shapes():
    proto = model("g (float[a] x) => (float[a] y) { y = Neg(x) }")
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.ClearField("shape")
    with pytest.raises(InvalidModelError, match=r'input "x": found no rank.*shapes='):
        opferry.compile(proto)
    np.testing.assert_array_equal(
        opferry.compile(proto, shapes={"x": ("b", 3)}).run({"x": X})["y"], -X
    )


def test_an_empty_dimension_is_refused():
    with pytest.raises(InvalidModelError, match='input "x" axis 0: found size 0'):
        run("g (float[0,3] x) => (float[0,3] y) { y = Relu(x) }")


# Shapes as values


def test_shape_values_come_out_as_int64_tensors():
    text = """g (float[b,c] x) => (int64[2] s, int64 n, int64[1] m) {
        i = Constant<value: tensor = int64 {1}>() s = Shape(x) n = Gather(s, i) m = Size(x)
        }"""
    text = text.replace(
        "m = Size(x)", "z = Constant<value: tensor = int64[1] {0}>() m = Gather(s, z)"
    )
    got = run(text)
    assert {k: (v.dtype, v.shape, v.tolist()) for k, v in got.items()} == {
        "s": (np.int64, (2,), [2, 3]),
        "n": (np.int64, (), 3),
        "m": (np.int64, (1,), [2]),
    }


def test_a_list_computed_in_the_graph():
    """[rows, 2 * rows] as cumulative lengths are made: Shape, Gather, Unsqueeze, Concat, CumSum."""
    text = """g (float[b,c] x) => (int64[2] y) {
        zero = Constant<value: tensor = int64 {0}>() axes = Constant<value: tensor = int64[1] {0}>()
        s = Shape(x) n = Gather(s, zero) v = Unsqueeze(n, axes) t = Concat<axis = 0>(v, v)
        y = CumSum(t, zero) }"""
    np.testing.assert_array_equal(run(text)["y"], [2, 4])


def test_a_computed_shape_reshapes():
    text = """g (float[b,c] x) => (float[p,q] y, float[r] z) {
        swap = Constant<value: tensor = int64[2] {1, -2}>()
        one = Constant<value: tensor = int64[1] {-1}>()
        s = Shape(x) t = Gather(s, swap) y = Reshape(x, t) z = Reshape(x, one) }"""
    got = run(text)
    np.testing.assert_array_equal(got["y"], X.reshape(3, 2))
    np.testing.assert_array_equal(got["z"], X.reshape(6))


def test_a_size_as_a_float():
    text = """g (float[b,c] x) => (float[b,c] y) {
        one = Constant<value: tensor = int64 {1}>() s = Shape(x) n = Gather(s, one)
        f = Cast<to = 1>(n) r = Sqrt(f) y = Div(x, r) }"""
    np.testing.assert_allclose(run(text)["y"], X / np.sqrt(np.float32(3)), rtol=1e-6)


def test_lists_for_our_operator_computed_in_the_graph():
    """Packed attention whose two sequence ends come from Shape: one sequence of all rows."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Shape", ["q"], ["t"], start=0, end=1),
        helper.make_node("Shape", ["k"], ["u"]),
        helper.make_node("Gather", ["u", "zero"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "axes"], ["v"]),
        helper.make_node(
            "SpeedFusionAttention",
            ["q", "k", "k", "", "", "", "", "t", "v"],
            ["y"],
            domain="mindspore",
            head_num=1,
            input_layout="TND",
            scale=0.5,
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("q", TensorProto.FLOAT, ["T", 1, 4]), value("k", TensorProto.FLOAT, ["U", 1, 4])],
        [value("y", TensorProto.FLOAT, ["T", 1, 4])],
        initializer=[
            numpy_helper.from_array(np.array(0), "zero"),
            numpy_helper.from_array(np.array([0]), "axes"),
        ],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("mindspore", 1)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=9)
    rng = np.random.default_rng(0)
    feeds = {n: rng.standard_normal((s, 1, 4), np.float32) for n, s in (("q", 3), ("k", 5))}
    got = opferry.compile(proto).run(feeds)["y"]
    np.testing.assert_allclose(got, evaluator(proto).run(None, feeds)[0], rtol=2e-5, atol=2e-5)
