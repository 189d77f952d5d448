"""From ONNX to Relax: domains, mixed models, optional inputs, functions, If, files, constants."""

import inspect
import warnings

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_model import X, model, run

import opferry
from opferry.frontend import importer
from opferry.frontend.fold import fold_constants
from opferry.frontend.model import prepare
from opferry.reference.whole_model import evaluator
from opferry.runtime.errors import (
    InvalidInputError,
    InvalidModelError,
    InvalidNodeError,
    InvalidTypeError,
    UnsupportedError,
)


def quant_node(x, y, weight, scale, name, **attrs):
    return helper.make_node(
        "NPUQuantMatmul", [x, weight, scale], [y], name=name, domain="npu", **attrs
    )


# Domains


def test_an_operator_of_a_foreign_domain_is_refused_by_name():
    head = '<ir_version: 9, opset_import: ["": 17, "foreign": 1]>'
    with pytest.raises(UnsupportedError, match=r"unsupported operators: foreign::Relu$"):
        run("g (float[2,3] x) => (float[2,3] y) { y = foreign.Relu(x) }", head=head)


def test_every_unsupported_operator_is_named_once():
    head = '<ir_version: 9, opset_import: ["": 17, "foreign": 1]>'
    text = """g (float[2,3] x) => (float[2,3] y) {
        a = foreign.Relu(x) b = foreign.Relu(a) c = foreign.Other(b) y = Relu(c) }"""
    with pytest.raises(UnsupportedError, match=r"operators: foreign::Relu, foreign::Other$"):
        run(text, head=head)


@pytest.mark.parametrize(
    ("nodes", "error", "message"),
    [
        ("y = Relu(nowhere)", InvalidModelError, "input 'nowhere' of node.*not output of any"),
        ("s = SequenceConstruct(x) y = SequenceAt(s, x)", InvalidModelError, "SequenceAt"),
        ("y = Hardmax(x) y = Relu(x)", InvalidModelError, "'y' has been used as output names"),
        ("s = Shape(x) y = RandomNormalLike(x)", UnsupportedError, "operators: RandomNormalLike"),
    ],
)
def test_an_output_without_a_rank_does_not_hide_what_is_wrong(nodes, error, message):
    proto = model(f"g (float[2,3] x) => (float[2,3] y) {{ {nodes} }}")
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(error, match=f"(?s){message}"):
        opferry.compile(proto)


def test_an_operator_of_a_subgraph_counts():
    head = '<ir_version: 9, opset_import: ["": 17, "foreign": 1]>'
    text = """g (bool p, float[2,3] x) => (float[2,3] y) { y = If (p) <
        then_branch = t () => (float[2,3] o) { o = foreign.Relu(x) },
        else_branch = e () => (float[2,3] q) { q = Neg(x) }> }"""
    with pytest.raises(UnsupportedError, match="foreign::Relu"):
        run(text, head=head)


def test_the_default_domain_by_its_alias():
    head = '<ir_version: 9, opset_import: ["ai.onnx": 17]>'
    y = run("g (float[2,3] x) => (float[2,3] y) { y = ai.onnx.Relu(x) }", head=head)["y"]
    np.testing.assert_array_equal(y, np.maximum(X, 0))


def test_an_unknown_operator_of_our_domain_is_refused():
    head = '<ir_version: 9, opset_import: ["": 17, "npu": 1]>'
    with pytest.raises(UnsupportedError, match="operator NPUQuant"):
        run("g (float[2,3] x) => (float[2,3] y) { y = npu.NPUQuant(x) }", head=head)


def test_tvm_still_has_the_methods_that_are_overridden():
    """The importer rests on these; a TVM release that changes one breaks it without a word."""
    for name, parameters in importer.OVERRIDDEN.items():
        method = getattr(importer.ONNXGraphImporter, name, None)
        assert method is not None, f"TVM's ONNXGraphImporter no longer has {name}"
        found = tuple(inspect.signature(method).parameters)
        assert found == parameters, f"TVM's ONNXGraphImporter.{name} takes {found} now"
    source = inspect.getsource(importer.ONNXGraphImporter)
    for call in ("self._construct_nodes(graph)", "self._convert_operator(op_name, inputs, attr"):
        assert call in source, f"TVM's importer no longer goes through {call}"


def test_overridden_methods_exist():
    for name in importer.OVERRIDDEN:
        assert name in vars(importer._Importer)


# Mixed models


@pytest.fixture(scope="module")
def mixed():
    """Two nodes of ours with different attributes between standard ones, weights in three forms."""
    rng = np.random.default_rng(0)
    w1 = rng.integers(-128, 128, (5, 7), np.int8)  # (n, k), through a Constant node
    w2 = rng.integers(-128, 128, (3, 5), np.int8)  # transposed by a standard node
    nodes = [
        helper.make_node("Constant", [], ["w1"], value=numpy_helper.from_array(w1)),
        quant_node("x", "h", "w1", "s1", "first", transpose_x2=1),
        helper.make_node("Max", ["h", "zero"], ["r"]),
        helper.make_node("Transpose", ["w2"], ["w2t"], perm=[1, 0]),
        quant_node("r", "z", "w2t", "s2", "second", output_dtype=TensorProto.FLOAT16),
        helper.make_node("Cast", ["z"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Softmax", ["f"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "mixed",
        [
            helper.make_tensor_value_info("x", TensorProto.INT8, ["M", 7]),
            helper.make_tensor_value_info("s2", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", 3]),
            helper.make_tensor_value_info("h", TensorProto.INT8, ["M", 5]),
        ],
        initializer=[
            numpy_helper.from_array(w2, "w2"),
            numpy_helper.from_array(np.full(5, 0.003, np.float32), "s1"),
            numpy_helper.from_array(np.zeros((), np.int8), "zero"),
        ],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("npu", 1)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=9)
    return proto, opferry.compile(proto)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_mixed_model_agrees_with_its_reference(mixed, rows):
    proto, module = mixed
    x = np.random.default_rng(rows).integers(-128, 128, (rows, 7), np.int8)
    feeds = {"x": x, "s2": np.float32([0.0005])}
    got, (y, h) = module.run(feeds), evaluator(proto).run(None, feeds)
    np.testing.assert_array_equal(got["h"], h)
    np.testing.assert_allclose(got["y"], y, rtol=1e-5, atol=1e-6)


def test_the_module_knows_what_it_was_made_of(mixed):
    assert mixed[1].manifest.operators == ("npu::NPUQuantMatmul", "npu::NPUQuantMatmul")


def test_an_optional_input_is_absent_by_its_empty_name():
    inputs = {"x1": (np.int8, (2, 3)), "x2": (np.int8, (3, 1)), "scale": (np.float32, (1,))}
    proto = opferry.node_model("NPUQuantMatmul", {**inputs, "bias": (np.int32, (1,))})
    assert list(proto.graph.node[0].input) == ["x1", "x2", "scale", "", "", "bias"]
    y = opferry.compile(proto).run(
        {
            "x1": np.int8([[1, 2, 3], [-4, 5, 6]]),
            "x2": np.int8([[1], [2], [3]]),
            "scale": np.float32([0.5]),
            "bias": np.int32([100]),
        }
    )["y"]
    # acc = 14 and 24; plus 100, halved: 57 and 62
    np.testing.assert_array_equal(y, [[57], [62]])


def test_quant_batch_mat_mul_swaps_its_last_inputs():
    """Position 4 is bias and 5 pertoken_scale; dtype 27 is bfloat16."""
    node = helper.make_node(
        "QuantBatchMatMul", ["x1", "x2", "s", "", "b", "p"], ["y"], name="q", dtype=27
    )
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "q",
        [
            value("x1", TensorProto.INT8, [1, 2]),
            value("x2", TensorProto.INT8, [2, 1]),
            value("s", TensorProto.FLOAT, [1]),
            value("b", TensorProto.FLOAT, [1]),
            value("p", TensorProto.FLOAT, [1]),
        ],
        [value("y", TensorProto.BFLOAT16, [1, 1])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)
    feeds = {"x1": np.int8([[3, 4]]), "x2": np.int8([[1], [2]])}
    feeds |= {"s": np.float32([0.5]), "b": np.float32([1]), "p": np.float32([2])}
    y = opferry.compile(proto).run(feeds)["y"]
    assert y.dtype == ml_dtypes.bfloat16
    assert y.item() == 12.0  # 11 * 0.5 * 2 + 1


def test_errors_name_the_node_and_its_input():
    inputs = {"x1": (np.int8, (2, 3)), "x2": (np.int8, (4, 1)), "scale": (np.float32, (1,))}
    with pytest.raises(InvalidNodeError, match=r'NPUQuantMatmul node "fc".*x2'):
        opferry.compile(opferry.node_model("NPUQuantMatmul", inputs, name="fc", check=False))
    inputs["x2"] = (np.float32, (3, 1))
    with pytest.raises(InvalidTypeError, match='"fc": input "x2": found float32, allowed int8'):
        opferry.compile(opferry.node_model("NPUQuantMatmul", inputs, name="fc", check=False))


def test_what_tvm_cannot_convert_is_an_error_that_names_the_node(capfd):
    text = """g (float[b,c] x, int64[2] s) => (float[p,q] y) { y = Reshape(x, s) }"""
    with pytest.raises(UnsupportedError, match=r'Reshape node "y": TVM\'s importer cannot convert'):
        opferry.compile(model(text))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


# Functions, subgraphs, files


def test_local_functions_are_inlined():
    head = '<ir_version: 9, opset_import: ["": 17, "local": 1]>'
    text = """g (float[2,3] x) => (float[2,3] y) { y = local.f(x) }
        <domain: "local", opset_import: ["": 17]> f (a) => (r) { q = Relu(a) r = Neg(q) }"""
    np.testing.assert_array_equal(run(text, head=head)["y"], -np.maximum(X, 0))


IF = """g (bool p, float[b,3] x) => (float[b,3] y, float[b,3] z) {
    h = Add(x, x)
    y = If (p) <
      then_branch = t () => (float[b,3] o) { r = Relu(h) e = Exp(r) o = Mul(e, r) },
      else_branch = e () => (float[b,3] q) { r = Neg(h) q = Add(r, r) }>
    z = Neg(y) }"""


@pytest.mark.parametrize("chosen", [True, False])
def test_if_takes_one_branch(chosen):
    got = run(IF, {"p": np.array(chosen), "x": X})
    r = np.maximum(2 * X, 0)
    want = np.exp(r) * r if chosen else -4 * X
    np.testing.assert_allclose(got["y"], want, rtol=1e-6)
    np.testing.assert_allclose(got["z"], -want, rtol=1e-6)


@pytest.mark.parametrize("chosen", [True, False])
def test_a_node_of_ours_in_a_branch(chosen):
    weight, value = np.int8([[2], [1]]), helper.make_tensor_value_info
    then = helper.make_graph(
        [quant_node("x", "t", "w", "s", "inner")],
        "then",
        [],
        [value("t", TensorProto.INT8, ["M", 1])],
        initializer=[numpy_helper.from_array(weight, "w")],
    )
    axes = numpy_helper.from_array(np.array([1]), "axes")
    other = helper.make_graph(
        [
            helper.make_node("Constant", [], ["axes"], value=axes),
            helper.make_node(
                "Constant", [], ["start"], value=numpy_helper.from_array(np.array([0]))
            ),
            helper.make_node("Constant", [], ["end"], value=numpy_helper.from_array(np.array([1]))),
            helper.make_node("Slice", ["x", "start", "end", "axes"], ["e"]),
        ],
        "else",
        [],
        [value("e", TensorProto.INT8, ["M", 1])],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["p"], ["y"], then_branch=then, else_branch=other)],
        "g",
        [value("p", TensorProto.BOOL, []), value("x", TensorProto.INT8, ["M", 2])],
        [value("y", TensorProto.INT8, ["M", 1])],
        initializer=[numpy_helper.from_array(np.float32([1.0]), "s")],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("npu", 1)]
    module = opferry.compile(helper.make_model(graph, opset_imports=imports, ir_version=9))
    x = np.int8([[3, 4], [-5, 6], [7, -8]])
    y = module.run({"p": np.array(chosen), "x": x})["y"]
    np.testing.assert_array_equal(y, [[10], [-4], [6]] if chosen else x[:, :1])


def test_external_data_is_read_beside_the_file(tmp_path):
    proto = model("g (float[2,3] x) => (float[2,3] y) <float[3] w = {1,2,3}> { y = Mul(x, w) }")
    weight = numpy_helper.from_array(np.float32([1, 2, 3]), "w")
    proto.graph.initializer[0].CopyFrom(weight)  # raw bytes: the only form that can be external
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").is_file()
    y = opferry.compile(path).run({"x": X})["y"]
    np.testing.assert_array_equal(y, X * [1, 2, 3])
    with pytest.raises(InvalidModelError, match='initializer "w": found a reference to external'):
        opferry.compile(onnx.load(path, load_external_data=False))
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(InvalidModelError, match="cannot be read as an ONNX model"):
        opferry.compile(path)


@pytest.mark.parametrize(
    "content", [b"", b"this is no model", b"\x08"], ids=["empty", "text", "cut"]
)
def test_a_file_that_is_no_model(tmp_path, content):
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(InvalidModelError, match=r"broken\.onnx|ONNX checker"):
        opferry.compile(path)


def test_old_models_list_their_initializers_as_inputs():
    head = '<ir_version: 3, opset_import: ["": 7]>'
    text = "g (float[b,3] x, float[3] w) => (float[b,3] y) <float[3] w = {1,2,3}> { y = Add(x,w) }"
    module = opferry.compile(model(text, head))
    assert [spec.name for spec in module.inputs] == ["x"]
    np.testing.assert_array_equal(module.run({"x": X})["y"], X + [1, 2, 3])


@pytest.mark.parametrize("dtype", ["string", "float8e4m3fn", "complex64"])
def test_element_types_without_kernels_are_refused(dtype):
    text = f"g ({dtype}[2] x) => ({dtype}[2] y) {{ y = Identity(x) }}"
    with pytest.raises(
        UnsupportedError, match=f'input "x": found element type {dtype}, allowed bool'
    ):
        run(text, head='<ir_version: 10, opset_import: ["": 21]>')


@pytest.mark.parametrize(
    "names", [("input.1", "x:0"), ("0", "a/b c"), ("main", "R"), ("für", "x_")]
)
def test_odd_input_names(names):
    proto = model("g (float[b,c] p, float[b,c] q) => (float[b,c] y) { y = Sub(p, q) }")
    for value, old, new in zip(proto.graph.input, "pq", names):
        value.name = new
        node = proto.graph.node[0]
        node.input[list(node.input).index(old)] = new
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = opferry.compile(proto)
    y = module.run(dict(zip(names, (X, 2 * X))))["y"]
    np.testing.assert_array_equal(y, -X)


# Outputs


def test_outputs_that_are_inputs_constants_or_the_same():
    text = """g (float[b,c] x) => (float[b,c] x, float[2] k, float[b,c] y, float[b,c] z)
        <float[2] k = {1, 2}> { y = Relu(x) z = Identity(y) }"""
    got = run(text)
    np.testing.assert_array_equal(got["x"], X)
    np.testing.assert_array_equal(got["k"], [1, 2])
    np.testing.assert_array_equal(got["y"], np.maximum(X, 0))
    np.testing.assert_array_equal(got["z"], got["y"])
    assert got["x"] is not X


def test_one_output_listed_twice():
    proto = model("g (float[b,c] x) => (float[b,c] y, float[b,c] y) { y = Neg(x) }")
    np.testing.assert_array_equal(opferry.compile(proto).run({"x": X})["y"], -X)


def test_a_model_without_inputs():
    y = run("g () => (float[2] y) <float[2] k = {-1, 2}> { y = Relu(k) }", {})["y"]
    np.testing.assert_array_equal(y, [0, 2])


def test_unused_outputs_of_our_nodes_need_no_name():
    feeds = dict.fromkeys(("query", "key", "value"), (np.float32, (1, 1, 2, 4)))
    proto = opferry.node_model(
        "SpeedFusionAttention", feeds, outputs=["softmax_sum"], head_num=1, input_layout="BNSD"
    )
    assert list(proto.graph.node[0].output) == ["", "", "softmax_sum"]
    got = opferry.compile(proto).run({n: np.zeros((1, 1, 2, 4), np.float32) for n in feeds})
    np.testing.assert_array_equal(got["softmax_sum"], np.full((1, 1, 2, 8), 2, np.float32))


# Gather and constants


GATHER = "g (int64[n] i) => (float[n,2] y) <float[3,2] t = {0,1,2,3,4,5}> { y = Gather(t, i) }"


def test_gather_takes_negative_indices():
    np.testing.assert_array_equal(
        run(GATHER, {"i": np.array([2, -3, -1])})["y"], [[4, 5], [0, 1], [4, 5]]
    )


@pytest.mark.parametrize("index", [3, -4, 2**40])
def test_gather_never_reads_outside_its_table(index):
    module = opferry.compile(model(GATHER))
    with pytest.raises(InvalidInputError, match=rf"indices: found index {index}, allowed -3 to 2"):
        module.run({"i": np.array([0, index])})


def test_constant_expressions_become_initializers():
    text = """g (float[3,2] x) => (float[3,2] y) <float[2,3] w = {1,2,3,4,5,6}> {
        t = Transpose<perm = [1, 0]>(w) c = Cast<to = 1>(t) y = Add(x, c) }"""
    folded = fold_constants(model(text))
    assert [node.op_type for node in folded.graph.node] == ["Add"]
    (constant,) = [t for t in folded.graph.initializer if t.name == "c"]
    np.testing.assert_array_equal(numpy_helper.to_array(constant), [[1, 4], [2, 5], [3, 6]])


def test_a_constant_that_would_grow_stays_a_node():
    text = """g (float[1] x) => (float[100000] y) <float[1] w = {1}, int64[1] s = {100000}> {
        e = Expand(w, s) y = Add(x, e) }"""
    assert [node.op_type for node in fold_constants(model(text)).graph.node] == ["Expand", "Add"]


def test_random_numbers_are_not_folded():
    text = """g (float[2] x) => (float[2] y) { r = RandomNormal<shape = [2]>() y = Add(x, r) }"""
    assert len(fold_constants(model(text)).graph.node) == 2


def test_what_a_subgraph_reads_is_kept():
    text = """g (bool p, float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
        t = Neg(w)
        y = If (p) <then_branch = a () => (float[2] o) { o = Add(x, t) },
                    else_branch = b () => (float[2] q) { q = Sub(x, t) }> }"""
    got = run(text, {"p": np.array(True), "x": np.float32([5, 5])})["y"]
    np.testing.assert_array_equal(got, [4, 3])


def test_prepare_leaves_the_model_alone():
    proto = model(
        "g (float[b,3] x) => (float[b,3] y) <float[3] w = {1,2,3}> { t = Neg(w) y = Add(x, t) }"
    )
    before = proto.SerializeToString()
    prepare(proto, {"b": 4})
    assert proto.SerializeToString() == before


def test_compiling_is_quiet(capfd):
    text = """g (float[b,c] x, int64[1] s) => (float[n,c] y, float[b,1] v, int64[b,1] i) {
        e = Constant<value: tensor = int64[1] {9}>() a = Constant<value: tensor = int64[1] {0}>()
        k = Constant<value: tensor = int64[1] {1}>()
        y = Slice(x, s, e, a) v, i = TopK<axis = 1>(x, k) }"""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = run(text, {"x": X, "s": np.array([1])})
    np.testing.assert_array_equal(got["y"], X[1:])
    np.testing.assert_array_equal(got["v"], X[:, 2:])
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
