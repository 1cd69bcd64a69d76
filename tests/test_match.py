"""Which weights are found, under which names, and which are left out by default."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import oftfx
from oftfx import OFT, PlanError
from oftfx.plan.candidates import UNUSED

SPEC = OFT(block_size=4)


def plan_of(model: nn.Module, spec: OFT = SPEC, width: int = 8):
    return oftfx.plan(model, spec, torch.randn(2, width))


def fqns(plan) -> list[str]:
    return [site.fqn for site in plan.sites]


def reasons(plan) -> dict[str, str]:
    return {skip.name: skip.reason for skip in plan.skipped}


def graphs(model: nn.Module, width: int = 8):
    """The model traced in each of the ways that give a graph of its own."""
    x = torch.randn(2, width)
    yield "symbolic", fx.symbolic_trace(model)
    program = torch.export.export(model, (x,))
    yield "exported", program
    yield "strict", torch.export.export(model, (x,), strict=True)
    yield "decomposed", program.run_decompositions()


# --- groups ---


class Attention(nn.Module):
    """q/k/v and gate/up read one tensor each, through casts and views."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.o = nn.Linear(8, 8)
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        h = self.norm(x)
        rows = h.reshape(-1, 8)
        kv = self.k(rows).reshape(h.shape[0], 4) + self.v(h.contiguous())
        x = x + self.o(self.q(h) * torch.cat([kv, kv], -1))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def test_sites_that_read_one_tensor_form_a_group():
    plan = plan_of(Attention())
    groups = [set(group.sites) for group in plan.groups]
    assert groups == [{"k", "v", "q"}, {"o"}, {"gate", "up"}, {"down"}]
    assert [group.in_features for group in plan.groups] == [8, 8, 8, 16]


def test_groups_are_the_same_in_every_form():
    model = Attention()
    plain = plan_of(model)
    for form, graph in graphs(model):
        assert oftfx.plan(graph, SPEC).groups == plain.groups, form


def test_sharing_inputs_leaves_one_rotation_a_group():
    plan = plan_of(Attention(), OFT(block_size=4, share_inputs=True))
    holders = {site.rotation for site in plan.sites}
    assert len(holders) == len(plan.groups) == 4
    assert [site.shared for site in plan.sites].count(True) == 3
    assert plan.num_trainable == 3 * 2 * 6 + 4 * 6
    own = plan_of(Attention())
    assert own.num_trainable == 6 * 2 * 6 + 4 * 6
    assert not any(site.shared for site in own.sites)


# --- names of weights ---


class Tied(nn.Module):
    """Two linears with one weight, a linear called twice, one with two names, one never called."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.twice = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.unused_parameter = nn.Parameter(torch.randn(3, 8))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.twice(F.relu(self.twice(self.b(self.a(x))))) + self.bias


def test_tied_weights_are_sites_of_their_own_and_marked():
    plan = plan_of(Tied())
    assert [(site.fqn, site.tied) for site in plan.sites] == [
        ("a", True),
        ("b", True),
        ("twice", False),
    ]
    assert [site.weight for site in plan.sites] == ["a.weight", "b.weight", "twice.weight"]
    assert all(site.kind == "linear" for site in plan.sites)


def test_a_linear_called_twice_is_one_site_with_a_group_of_its_own():
    plan = plan_of(Tied())
    groups = [set(group.sites) for group in plan.groups]
    assert {"twice"} in groups


def test_weights_never_used_are_reported():
    found = reasons(plan_of(Tied()))
    assert found["unused"] == found["unused_parameter"] == UNUSED
    assert "bias" not in found  # a vector is no candidate
    with pytest.raises(PlanError, match=r"unused: never used"):
        plan_of(Tied(), OFT(block_size=4, targets="unused"))


def test_a_module_with_two_names_is_one_site():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(8, 8)
            self.other = self.one

        def forward(self, x):
            return self.one(x) + self.other(F.relu(x))

    model = Twins()
    plan = plan_of(model)
    assert [(site.fqn, site.kind, site.tied) for site in plan.sites] == [("one", "linear", False)]
    assert oftfx.adapt(model, plan) is model
    (theta,) = oftfx.parameters(model)
    with torch.no_grad():
        theta.normal_(std=0.1)
    x = torch.randn(2, 8)
    w = model.one.oft_base.forward  # both calls are rotated, by the same rotation
    rotated = model.one.oft["default"](x), model.one.oft["default"](F.relu(x))
    torch.testing.assert_close(model(x), w(model.one, rotated[0]) + w(model.other, rotated[1]))


def test_a_weight_read_by_its_neighbour_is_functional():
    class Neighbour(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(12, 8)
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return F.linear(self.fc(x), self.fc.weight) + x

    (site,) = plan_of(Neighbour()).sites
    assert (site.fqn, site.kind) == ("fc", "functional")


def test_a_subclass_of_linear_is_a_linear_while_it_keeps_its_forward():
    class Named(nn.Linear):
        pass

    class Residual(nn.Linear):
        def forward(self, x):
            return x + super().forward(x)

    first, second = plan_of(nn.Sequential(Named(8, 8), Residual(8, 8))).sites
    assert (first.fqn, first.kind) == ("0", "linear")
    assert (second.fqn, second.kind) == ("1", "functional")  # it reads its input twice


def test_a_bare_linear_has_an_empty_name_and_is_a_site():
    (site,) = plan_of(nn.Linear(8, 4)).sites
    assert site.weight == "weight"
    assert site.in_features == 8


# --- left out by default ---


class Language(nn.Module):
    """An embedding, a body, a head onto the vocabulary; by default tied."""

    def __init__(self, tied: bool = True, router: bool = False):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.router = nn.Linear(8, 4) if router else None
        self.head = nn.Linear(8, 12, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        h = F.relu(self.body(self.embed(tokens)))
        if self.router is not None:
            weights, _ = torch.topk(self.router(h).softmax(-1), 2)
            h = h * weights.sum(-1, keepdim=True)
        return self.head(h)


TOKENS = torch.zeros(1, 3, dtype=torch.long)


@pytest.mark.parametrize("tied", [False, True])
def test_the_output_head_is_left_out_and_can_be_named(tied):
    plan = oftfx.plan(Language(tied), SPEC, TOKENS)
    assert fqns(plan) == ["body"]
    assert reasons(plan)["head"] == "output head"
    named = oftfx.plan(Language(tied), OFT(block_size=4, targets=["body", "head"]), TOKENS)
    assert [(site.fqn, site.tied) for site in named.sites] == [("body", False), ("head", tied)]
    assert reasons(named) == {"embed": "not a target"}


@pytest.mark.parametrize("tied", [False, True])
def test_the_output_head_is_known_in_a_program(tied):
    program = torch.export.export(Language(tied), (TOKENS,))
    for graph in (program, program.run_decompositions()):
        plan = oftfx.plan(graph, SPEC)
        assert fqns(plan) == ["body"]
        assert reasons(plan)["head"] == "output head"


def test_a_router_is_left_out_and_can_be_named():
    model = Language(router=True)
    plan = oftfx.plan(model, SPEC, TOKENS)
    assert fqns(plan) == ["body"]
    assert reasons(plan)["router"] == "MoE router"
    assert fqns(oftfx.plan(model, OFT(block_size=4, targets="router"), TOKENS)) == ["router"]


def test_a_square_layer_over_the_vocabulary_width_is_no_head():
    """What feeds another matmul projects onto no vocabulary, whatever its width."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(12, 8)
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, tokens):
            return self.down(F.relu(self.up(self.embed(tokens))))

    assert fqns(oftfx.plan(Wide(), SPEC, TOKENS)) == ["up", "down"]
