"""An embedding that is named is rotated as it is looked up; one that is not stays as it is."""

import copy
import pickle

import pytest
import torch
from torch import nn

import oftfx
from oftfx import OFT, PlanError
from tests.small import llama, tokens


class Net(nn.Module):
    def __init__(self, **fields):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 8, **fields)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.table(ids)))


IDS = torch.tensor([[1, 4, 1], [0, 10, 7]])


def turned(spec=None, net=None, capture="graph"):
    net = Net() if net is None else net
    spec = spec or OFT(block_size=4, targets="table")
    inputs = None if hasattr(net, "config") else IDS
    oftfx.adapt(net, spec, example_inputs=inputs, capture=capture)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in oftfx.parameters(net):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def test_all_linear_leaves_it_alone():
    plan = oftfx.plan(Net(), OFT(block_size=4, targets="head"), IDS)
    assert [site.fqn for site in plan.sites] == ["head"]
    plan = oftfx.plan(llama(), OFT(block_size=4))
    assert {skip.name: skip.reason for skip in plan.skipped}["model.embed_tokens"] == "embedding"


@pytest.mark.parametrize("capture", ["graph", "modules"])
def test_what_is_looked_up_is_rotated(capture):
    net, base = turned(capture=capture), Net()
    (factor,) = net.table.oft.default.factors()
    torch.testing.assert_close(net(IDS), base.head(torch.tanh(factor(base.table(IDS)))))
    assert net.head.weight is net.table.weight  # the head is not rotated
    with oftfx.disabled(net):
        assert torch.equal(net(IDS), base(IDS))
    oftfx.remove(net)
    assert torch.equal(net(IDS), base(IDS))


def test_merged_it_is_a_table_of_its_own():
    net = turned(oftfx.BOFT(block_size=4, factors=2, targets=["table", "head"]))
    expected = net(IDS)
    _, report = oftfx.merge(net, report=True)
    torch.testing.assert_close(net(IDS), expected)
    assert type(net.table) is nn.Embedding
    assert net.head.weight is not net.table.weight
    assert max(site.output_error for site in report.sites) < 1e-5


def test_two_adapters_compose_in_order():
    net = turned()
    expected = net.table(IDS)
    oftfx.adapt(net, OFT(block_size=8, targets="table", init_std=0.1), "second", IDS)
    (factor,) = net.table.oft.second.factors()
    expected = factor(expected)
    torch.testing.assert_close(net.table(IDS), expected)
    oftfx.merge(net)
    torch.testing.assert_close(net.table(IDS), expected)


def test_two_adapters_are_used_in_another_order_but_not_by_row():
    net = turned()
    oftfx.adapt(net, OFT(block_size=8, targets="table", init_std=0.1), "second", IDS)
    (one,), (two,) = (net.table.oft[name].factors() for name in ("default", "second"))
    oftfx.use(net, ["second", "default"])
    torch.testing.assert_close(net.table(IDS), one(two(Net().table(IDS))))
    with pytest.raises(PlanError, match="an embedding"), oftfx.rows(net, ["second", None]):
        pass


def test_it_is_trained_saved_and_loaded(tmp_path):
    net = turned()
    net(IDS).square().sum().backward()
    assert net.table.oft.default.theta.grad.abs().sum() > 0
    oftfx.save(net, tmp_path)
    again = oftfx.load(Net(), tmp_path)
    assert torch.equal(again(IDS), net(IDS))
    for copied in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
        assert torch.equal(copied(IDS), net(IDS))


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (OFT(block_size=4, magnitude=True, targets="table"), "an embedding has none"),
        (oftfx.PSOFT(rank=4, targets="table"), "not an embedding"),
        (OFT(block_size=5, targets="table"), "block_size=5 does not divide"),
    ],
)
def test_a_method_that_does_not_fit_is_refused(spec, why):
    with pytest.raises(PlanError, match=why):
        oftfx.adapt(Net(), spec, example_inputs=IDS)


def test_a_table_that_changes_as_it_is_read_is_refused():
    with pytest.raises(PlanError, match="embedding"):
        oftfx.adapt(Net(max_norm=1.0), OFT(block_size=4, targets="table"), example_inputs=IDS)


def test_graphs_are_refused():
    program = torch.export.export(Net(), (IDS,))
    with pytest.raises(PlanError, match="no matmul"):
        oftfx.adapt(program, OFT(block_size=4, targets="table"))
    exported = torch.export.export(turned(), (IDS,))
    torch.testing.assert_close(exported.module()(IDS), turned()(IDS))


def test_as_lora_it_is_refused(tmp_path):
    with pytest.raises(oftfx.CheckpointError, match="embedding"):
        oftfx.save(turned(), tmp_path, format="lora", rank=4)


def test_in_a_language_model_the_tied_head_stays():
    model, base = llama(), llama()
    turned(OFT(block_size=8, targets="embed_tokens"), model)
    ids = tokens()
    (factor,) = model.model.embed_tokens.oft.default.factors()
    embeds = factor(base.model.embed_tokens(ids["input_ids"]))
    expected = base(inputs_embeds=embeds, use_cache=False).logits
    torch.testing.assert_close(model(**ids).logits, expected)
