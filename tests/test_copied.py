"""What ``also_train`` names is trained as it is, and the base's own tensors come back."""

import copy

import pytest
import torch
from torch import nn

import oftfx
from oftfx import OFT, PlanError, SpecError
from oftfx.checkpoint import restore
from tests.small import Tied, llama, tokens


class Net(nn.Module):
    """Two layers under a norm, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 8)
        self.score = nn.Linear(8, 3)

    def forward(self, x):
        return self.score(torch.tanh(self.up(self.norm(x))))


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
SPEC = OFT(block_size=4, also_train=["score", "norm", "up.bias"])
NAMES = ["norm.weight", "norm.bias", "up.bias", "score.weight", "score.bias"]


def trained(spec=SPEC, name="default", net=None):
    net = Net() if net is None else net
    oftfx.adapt(net, spec, name, X)
    optimizer = torch.optim.SGD(oftfx.parameters(net, name), 0.01)
    for _ in range(2):
        net(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def same(net, before):
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_plan_says_what_is_trained_as_it_is():
    plan = oftfx.plan(Net(), SPEC, X)
    assert [tensor.name for tensor in plan.copied] == NAMES
    assert [site.fqn for site in plan.sites] == ["up"]
    assert "trained as it is" in str(plan)
    assert plan.num_trainable == 2 * 6 + 8 + 8 + 8 + 24 + 3
    assert oftfx.Plan.from_json(plan.to_json()) == plan


def test_the_start_is_the_base_and_only_what_is_named_is_trained():
    net, base = Net(), Net()
    oftfx.adapt(net, SPEC, example_inputs=X)
    assert torch.equal(net(X), base(X))
    assert sorted(n for n, p in net.named_parameters() if p.requires_grad) == sorted(
        [*NAMES, "up.oft.default.theta"]
    )
    assert len(oftfx.parameters(net)) == len(NAMES) + 1


def test_training_moves_every_named_tensor():
    net, base = trained(), Net().state_dict()
    assert all(not torch.equal(net.get_parameter(name), base[name]) for name in NAMES)
    assert torch.equal(net.up.weight, base["up.weight"])


def test_disabled_and_removed_it_is_the_base():
    base = Net()
    net = trained()
    turned = net(X)
    with oftfx.disabled(net):
        assert torch.equal(net(X), base(X))
    assert torch.equal(net(X), turned)
    oftfx.remove(net)
    same(net, base.state_dict())
    assert all(parameter.requires_grad for parameter in net.parameters())


class Whole(nn.Module):
    """A model with a part that is adapted separately."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.net = Net()

    def forward(self, x):
        return self.net(self.first(x))


@pytest.mark.parametrize("order", [["inner", "outer"], ["outer", "inner"]])
@pytest.mark.parametrize("at_once", [True, False])
def test_removed_with_a_part_that_was_adapted_separately_it_is_the_base(order, at_once):
    whole = Whole()
    whole.net.up.bias.requires_grad_(False)
    before = copy.deepcopy(whole.state_dict())
    flags = {key: value.requires_grad for key, value in whole.named_parameters()}
    outer = OFT(block_size=4, targets=["first", "up"], also_train="up.bias", init_std=0.1)
    inner = OFT(block_size=4, targets="up", also_train="score", init_std=0.1)
    given = {"inner": (whole.net, inner), "outer": (whole, outer)}
    for name in order:
        oftfx.adapt(*given[name], name, X)
    with torch.no_grad():
        for parameter in oftfx.parameters(whole):
            parameter.add_(0.1)
    for name in [None] if at_once else reversed(order):
        oftfx.remove(whole, name)
    assert oftfx.adapters(whole) == {}
    same(whole, before)
    assert {key: value.requires_grad for key, value in whole.named_parameters()} == flags
    oftfx.adapt(whole, outer, example_inputs=X)


def test_after_a_cast_the_base_comes_back_cast():
    base, net = Net().double(), trained().double()
    with oftfx.disabled(net):
        assert torch.equal(net(X.double()), base(X.double()))
    oftfx.remove(net)
    same(net, base.state_dict())


def test_saved_and_loaded_it_is_the_same_function(tmp_path):
    net = trained()
    oftfx.save(net, tmp_path)
    again = Net()
    with torch.no_grad():  # a new head differs from run to run
        again.score.weight.add_(1)
    before = copy.deepcopy(again.state_dict())
    oftfx.load(again, tmp_path)
    assert torch.equal(again(X), net(X))
    oftfx.remove(again)
    same(again, before)


def test_restored_values_are_those_that_were_saved(tmp_path):
    net = trained()
    expected = net(X)
    oftfx.save(net, tmp_path)
    with torch.no_grad():
        for parameter in oftfx.parameters(net):
            parameter.add_(1)
    restore(net, tmp_path)
    assert torch.equal(net(X), expected)


def test_another_shape_is_refused(tmp_path):
    oftfx.save(trained(), tmp_path)
    other = Net()
    other.score = nn.Linear(8, 5)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(oftfx.CheckpointError, match=r"score.weight is \(5, 8\) here, \(3, 8\)"):
        oftfx.load(other, tmp_path)
    same(other, before)


def test_merged_it_stays():
    net = trained()
    expected = net(X)
    oftfx.merge(net)
    assert torch.allclose(net(X), expected, atol=1e-6)
    assert type(net.up) is nn.Linear
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_a_tied_tensor_is_untied_and_tied_again():
    """The copy is the named module's alone."""
    net = Tied().eval()
    base = net(X)
    oftfx.adapt(net, OFT(block_size=4, targets="a", also_train="b"), example_inputs=X)
    assert net.a.weight is not net.b.weight
    with torch.no_grad():
        net.b.weight.add_(1)
    with oftfx.disabled(net):
        assert net.a.weight is net.b.weight
        assert torch.equal(net(X), base)
    oftfx.remove(net)
    assert net.a.weight is net.b.weight


def test_a_merged_model_forgets_a_tie_that_is_gone(tmp_path):
    model = llama()
    oftfx.adapt(model, OFT(block_size=8, targets="q_proj", also_train="lm_head"))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    expected = model(**tokens()).logits
    oftfx.merge(model)
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path)(**tokens()).logits, expected)


def test_two_adapters_train_different_tensors():
    net = trained(OFT(block_size=4, also_train="score"), "one")
    score = net.score.weight.detach().clone()
    trained(OFT(block_size=4, also_train="norm"), "two", net)
    assert torch.equal(net.score.weight, score)
    assert len(oftfx.parameters(net, "one")) == 3
    oftfx.remove(net, "one")
    assert torch.equal(net.score.weight, Net().score.weight)
    assert not torch.equal(net.norm.weight, Net().norm.weight)


def test_adapters_that_train_the_same_tensor_are_used_in_turn(tmp_path):
    net, base = trained(OFT(block_size=4, also_train="score"), "one"), Net()
    one = net(X)
    with pytest.raises(PlanError, match="both train score"):
        oftfx.adapt(net, OFT(block_size=4, also_train="score"), "two", X)
    oftfx.use(net, [])
    assert torch.equal(net(X), base(X))
    trained(OFT(block_size=8, also_train="score"), "two", net)
    two = net(X)
    assert not torch.equal(one, two)
    with pytest.raises(PlanError, match="both train score"):
        oftfx.use(net, ["one", "two"])
    oftfx.save(net, tmp_path, "one")
    oftfx.use(net, "one")
    assert torch.equal(net(X), one)
    assert torch.equal(oftfx.load(Net(), tmp_path)(X), one)
    with oftfx.disabled(net):
        assert torch.equal(net(X), base(X))
    with pytest.raises(PlanError, match="which no rotation leads to"):
        oftfx.scale(net, 0.5)
    with pytest.raises(PlanError, match="which all rows share"), oftfx.rows(net, ["one", None]):
        pass
    merged = oftfx.merge(copy.deepcopy(net), names=["two"])
    assert torch.allclose(merged(X), two, atol=1e-5)
    oftfx.remove(net)
    same(net, base.state_dict())


@pytest.mark.parametrize(
    ("rule", "why"),
    [("scor", "near misses: score"), ("up.rotation", "matches no parameter")],
)
def test_a_rule_that_names_nothing_is_refused(rule, why):
    with pytest.raises(PlanError, match=why):
        oftfx.adapt(Net(), OFT(block_size=4, also_train=rule), example_inputs=X)


def test_a_tensor_called_as_one_of_the_rotations_is_refused():
    net = Net()
    net.up.alpha = nn.Parameter(torch.ones(1))
    with pytest.raises(PlanError, match=r"up\.alpha is called as what PSOFT trains at up"):
        oftfx.plan(net, oftfx.PSOFT(rank=4, targets="up", also_train="up.alpha"), X)


@pytest.mark.parametrize("rule", ["norm", "norm.weight"])
def test_a_norm_whose_statistics_training_moves_is_refused(rule):
    net = Net()
    net.norm = nn.BatchNorm1d(8)
    with pytest.raises(PlanError, match=r"norm\.weight is of a norm with running statistics"):
        oftfx.plan(net, OFT(block_size=4, also_train=rule), X)
    net.norm = nn.BatchNorm1d(8, track_running_stats=False)
    assert oftfx.plan(net, OFT(block_size=4, also_train=rule), X).copied


def test_a_rule_is_a_name_or_a_regex():
    with pytest.raises(SpecError, match="also_train"):
        OFT(also_train=3)


def test_a_graph_is_refused():
    graph = torch.fx.symbolic_trace(Net())
    with pytest.raises(PlanError, match="a graph has no place"):
        oftfx.adapt(graph, SPEC)


def test_what_is_exported_computes_with_the_copies():
    net = trained()
    exported = torch.export.export(net, (X,))
    assert torch.allclose(exported.module()(X), net(X))
    with pytest.raises(PlanError, match="ExportedProgram"):
        oftfx.plan(exported, SPEC)
