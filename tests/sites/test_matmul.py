"""Every spelling of x·W in a graph, seen from each of its forms."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import oftfx
from oftfx.sites import (
    PROVIDERS,
    as_quantiser,
    conv1d,
    linear,
    matmul,
    provider_named,
    provider_of,
)
from oftfx.sites.quantised import Quantiser

SPEC = oftfx.OFT(block_size=4)
OUT_IN, IN_OUT = (12, 8), (8, 12)


class Product(nn.Module):
    """One weight and one function of (x, w)."""

    def __init__(self, function, shape):
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(12))
        self.function = function

    def forward(self, x):
        return self.function(x, self.w, self.bias)


# x (3, 8) → (3, 12), however it is written.
SPELLINGS = {
    "linear": (lambda x, w, b: F.linear(x, w), OUT_IN),
    "linear with bias": (lambda x, w, b: F.linear(x, w, b), OUT_IN),
    "linear by keywords": (lambda x, w, b: F.linear(input=x, weight=w, bias=b), OUT_IN),
    "linear, weight by keyword": (lambda x, w, b: F.linear(x, weight=w), OUT_IN),
    "linear of a transpose": (lambda x, w, b: F.linear(x, w.T), IN_OUT),
    "@": (lambda x, w, b: x @ w, IN_OUT),
    "@ .T": (lambda x, w, b: x @ w.T, OUT_IN),
    "@ .mT": (lambda x, w, b: x @ w.mT, OUT_IN),
    "@ .t()": (lambda x, w, b: x @ w.t(), OUT_IN),
    "@ .T.T": (lambda x, w, b: x @ w.T.T, IN_OUT),
    "@ transpose": (lambda x, w, b: x @ w.transpose(0, 1), OUT_IN),
    "@ transpose from the end": (lambda x, w, b: x @ w.transpose(-1, -2), OUT_IN),
    "@ torch.transpose": (lambda x, w, b: x @ torch.transpose(w, 1, 0), OUT_IN),
    "@ transpose by keywords": (lambda x, w, b: x @ w.transpose(dim0=0, dim1=1), OUT_IN),
    "@ permute": (lambda x, w, b: x @ w.permute(1, 0), OUT_IN),
    "@ permute that does nothing": (lambda x, w, b: x @ w.permute(0, 1), IN_OUT),
    "@ torch.permute by keyword": (lambda x, w, b: x @ torch.permute(w, dims=(1, 0)), OUT_IN),
    "@ torch.permute in place": (lambda x, w, b: x @ torch.permute(w, dims=(0, 1)), IN_OUT),
    "torch.matmul": (lambda x, w, b: torch.matmul(x, w), IN_OUT),
    "torch.matmul by keywords": (lambda x, w, b: torch.matmul(input=x, other=w), IN_OUT),
    "x.matmul": (lambda x, w, b: x.matmul(w), IN_OUT),
    "torch.mm": (lambda x, w, b: torch.mm(x, w), IN_OUT),
    "x.mm": (lambda x, w, b: x.mm(w.T), OUT_IN),
    "torch.mm by keyword": (lambda x, w, b: torch.mm(x, mat2=w), IN_OUT),
    "torch.addmm": (lambda x, w, b: torch.addmm(b, x, w), IN_OUT),
    "torch.addmm of a transpose": (lambda x, w, b: torch.addmm(b, x, w.t()), OUT_IN),
    "torch.addmm by keywords": (lambda x, w, b: torch.addmm(b, mat1=x, mat2=w), IN_OUT),
    "b.addmm": (lambda x, w, b: b.addmm(x, w), IN_OUT),
    "cast weight": (lambda x, w, b: x.double() @ w.double(), IN_OUT),
    "cast, detached, copied": (lambda x, w, b: x @ w.detach().to(x.dtype).clone().T, OUT_IN),
}


def forms(model: nn.Module, x: torch.Tensor):
    """The model as every kind of thing that can be planned."""
    yield "module", model, x
    yield "symbolic", fx.symbolic_trace(model), None
    program = torch.export.export(model, (x,))
    yield "exported", program, None
    yield "strict", torch.export.export(model, (x,), strict=True), None
    yield "decomposed", program.run_decompositions(), None


class Sum(nn.ModuleList):
    def forward(self, x):
        return sum(term(x) for term in self)


@pytest.fixture(scope="module")
def planned() -> dict[str, oftfx.Plan]:
    """By form, the plan of a model in which each spelling has its turn."""
    model = Sum(Product(*spelling) for spelling in SPELLINGS.values())
    return {form: oftfx.plan(it, SPEC, x) for form, it, x in forms(model, torch.randn(3, 8))}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_found_in_every_form(planned, name):
    weight = f"{list(SPELLINGS).index(name)}.w"
    layout = "out_in" if SPELLINGS[name][1] == OUT_IN else "in_out"
    for form, plan in planned.items():
        (site,) = (site for site in plan.sites if site.fqn == weight)
        found = (site.kind, site.in_features, site.out_features, site.layout)
        assert found == ("functional", 8, 12, layout), form
        assert not plan.skipped, form


# A weight that something else than x·W reads: (function, shape, what the reason must hold).
MISFITS = {
    "left operand": (lambda x, w, b: w @ x.T, OUT_IN, "m"),
    "elementwise": (lambda x, w, b: x * w, (3, 8), "mul"),
    "sliced": (lambda x, w, b: x @ w[:, :4], IN_OUT, "no matmul"),
    "also summed": (lambda x, w, b: x @ w + w.sum(), IN_OUT, "besides a matmul, `sum"),
    "both ways": (lambda x, w, b: (x @ w) @ w.T, IN_OUT, "both as x·Wᵀ and as x·W"),
    "both ways, square": (lambda x, w, b: x @ w + x @ w.T, (8, 8), "both as x·Wᵀ and as x·W"),
    "einsum": (lambda x, w, b: torch.einsum("ij,jk->ik", x, w), IN_OUT, "no matmul"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_no_rotation_fits_is_skipped_with_its_reason(name):
    function, shape, reason = MISFITS[name]

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd = Product(function, shape)
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            return self.odd(x).sum() + self.fc(x)

    for form, model, x in forms(Both(), torch.randn(3, 8)):
        plan = oftfx.plan(model, SPEC, x)
        assert [site.fqn for site in plan.sites] == ["fc"], form
        (skip,) = plan.skipped
        assert skip.name == "odd.w", form
        assert reason in skip.reason, form
        with pytest.raises(oftfx.PlanError, match=r"odd\.w"):  # asked for by name: an error
            oftfx.plan(model, oftfx.OFT(block_size=4, targets="odd.w"), x)


def test_a_reason_names_the_users_line():
    plan = oftfx.plan(
        nn.Sequential(nn.Linear(8, 8), Product(lambda x, w, b: x * w, (3, 8))),
        SPEC,
        torch.randn(3, 8),
    )
    (skip,) = plan.skipped
    assert "test_matmul.py:" in skip.reason


@pytest.mark.parametrize(
    ("dtype", "told"), [(torch.int64, "int64"), (torch.complex64, "complex64")]
)
def test_integer_and_complex_weights_are_left_alone_and_refused_by_name(dtype, told):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(8, 8, dtype=dtype), requires_grad=False)
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return (x.to(self.w.dtype) @ self.w).real.float() + self.fc(x)

    x = torch.ones(2, 8)
    plan = oftfx.plan(Odd(), SPEC, x)
    assert [site.fqn for site in plan.sites] == ["fc"]
    assert told in plan.skipped[0].reason
    with pytest.raises(oftfx.PlanError, match=told):
        oftfx.plan(Odd(), oftfx.OFT(block_size=4, targets="w"), x)


# --- the helpers ---


def graph_of(function) -> fx.Graph:
    return fx.symbolic_trace(function).graph


def result(graph: fx.Graph) -> fx.Node:
    (node,) = graph.find_nodes(op="output")
    return node.args[0]


def test_operands_are_replaced_where_they_stand():
    for function in (lambda x, w, z: F.linear(x, w), lambda x, w, z: F.linear(input=x, weight=w)):
        graph = graph_of(function)
        x, w, z = graph.find_nodes(op="placeholder")
        node = result(graph)
        spelled = matmul.spelling(node)
        assert (spelled.x.of(node), spelled.w.of(node)) == (x, w)
        spelled.x.replace(node, z)
        assert (spelled.x.of(node), spelled.w.of(node)) == (z, w)
        assert set(node.all_input_nodes) == {z, w}


def test_an_operand_that_is_no_tensor_of_the_graph_is_none():
    graph = fx.Graph()
    node = graph.call_function(torch.matmul, (graph.placeholder("x"), 2.0))
    assert matmul.spelling(node).w.of(node) is None


def test_what_is_no_matmul_has_no_spelling():
    for function in (lambda x: x + x, lambda x: F.conv1d(x, x), lambda x: x.view(-1)):
        assert matmul.spelling(result(graph_of(function))) is None


def test_views_of_an_activation_lead_back_to_it():
    graph = graph_of(lambda x: x.reshape(-1, 8).float().contiguous().view(2, 4, 8))
    assert matmul.tensor_behind(result(graph)).op == "placeholder"
    other = graph_of(lambda x: x.transpose(0, 1))  # other rows: not the same input
    assert matmul.tensor_behind(result(other)) is result(other)


# --- providers ---


def test_providers_know_their_modules():
    class Mine(nn.Linear):
        pass

    from transformers.pytorch_utils import Conv1D

    assert provider_of(nn.Linear(2, 2)) is linear
    assert provider_of(Mine(2, 2)) is linear
    assert provider_of(Conv1D(2, 2)) is conv1d
    assert provider_of(nn.Embedding(2, 2)) is None
    assert provider_of(nn.Bilinear(2, 2, 2)) is None
    assert provider_named("torch.nn.modules.linear.Linear") is linear
    assert provider_named("torch.nn.modules.sparse.Embedding") is None


def test_a_provider_is_a_quantiser_if_it_has_all_that_one_needs():
    kinds = {provider.KIND for provider in PROVIDERS if as_quantiser(provider) is provider}
    assert kinds == {p.KIND for p in PROVIDERS if isinstance(p, Quantiser)}
    assert {p.KIND for p in PROVIDERS} - kinds == {"linear", "conv1d"}
    assert as_quantiser(linear) is None
    assert as_quantiser(None) is None
