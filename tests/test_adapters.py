"""Several adapters on one model: in use, in order, in part, in between, and row by row."""

import copy
import dataclasses
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torch.export import export

import oftfx
from oftfx import BOFT, COFT, GOFT, HRA, LOFT, OFT, PSOFT, QGOFT, MergeError, PlanError, testing
from oftfx.modules import rotations
from tests.small import llama, rows, small, tokens
from tests.test_modules import ran

A = OFT(block_size=4, init_std=0.2, seed=1)
B = OFT(block_size=2, init_std=0.3, seed=2, exact=True, magnitude=True)
SPECS = {
    "OFT": OFT(block_size=4, init_std=0.2),
    "OFT, shared": OFT(block_size=4, init_std=0.2, share_inputs=True, magnitude=True),
    "OFT, one block": OFT(block_size=4, init_std=0.2, share_blocks=True, guard="rescale"),
    "COFT": COFT(block_size=4, init_std=0.05, eps=1.0),
    "BOFT": BOFT(block_size=4, factors=2, init_std=0.2, unit_rate=True),
    "GOFT": GOFT(init_std=0.3, scale=True),
    "HRA": HRA(rank=4, init_std=0.5),
    "PSOFT": PSOFT(rank=4, init_std=0.2),
    "LOFT": LOFT(rank=4, init_std=0.2, support="coordinate"),
}
FREE = {
    "qGOFT": QGOFT(init_std=0.2),
    "LOFT, free": LOFT(rank=3, init_std=0.2, support="random", core="free"),
}
LINEAR = {name: spec for name, spec in SPECS.items() if name != "HRA"}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
x = rows()


def adapted(a=A, b=B, name: str = "mlp") -> nn.Module:
    """A model of two adapters, `a` and then `b`, both in use."""
    model = small(name)
    capture = "graph" if name == "functional" or a.share_inputs else "modules"
    for adapter, spec in (("a", a), ("b", b)):
        oftfx.adapt(model, spec, adapter, example_inputs=x, capture=capture)
    return model


def output(model: nn.Module, names=None) -> torch.Tensor:
    """Of the adapters in use, or of these."""
    if names is not None:
        oftfx.use(model, names)
    with torch.no_grad():
        return model(x)


def base_of(spec) -> str:
    return "attention" if spec.share_inputs else "mlp"


def twins(spec) -> nn.Module:
    """A model of two adapters of one method."""
    return adapted(spec, dataclasses.replace(spec, init_std=0.1), base_of(spec))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


# in use


def test_a_new_adapter_composes_with_those_in_use():
    model = adapted()
    oftfx.use(model, ["b", "a"])
    oftfx.adapt(model, A, "c", capture="modules")
    assert list(oftfx.adapters(model)) == ["b", "a", "c"]
    oftfx.use(model, "b")
    assert oftfx.adapters(model) == {
        "b": oftfx.Adapter(in_use=True, scale=1.0),
        "a": oftfx.Adapter(in_use=False, scale=1.0),
        "c": oftfx.Adapter(in_use=False, scale=1.0),
    }
    oftfx.remove(model, "b")
    assert not any(adapter.in_use for adapter in oftfx.adapters(model).values())
    assert oftfx.adapters(small("mlp")) == {}


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_the_first_named_meets_x_first(order):
    model, base = adapted(B, A), small("mlp")
    oftfx.use(model, order)
    layer = model[0]
    first, second = (layer.oft[name] for name in order)
    by_hand = second(first(x)) @ base[0].weight.T
    for name in order:
        magnitudes = layer.oft[name].magnitudes()
        by_hand = by_hand * (1 + magnitudes[0].double()) if magnitudes else by_hand
    testing.assert_close(layer(x).detach(), (by_hand + base[0].bias).detach(), "x·R1·R2·Wᵀ")
    other = output(model, order[::-1])
    assert not torch.allclose(other, output(model, order), atol=1e-3)


@pytest.mark.parametrize("name", ["attention", "functional", "tied"])
@given(st.lists(st.sampled_from(["a", "b", "c"]), unique=True, min_size=1), st.floats(-1, 1.5))
def test_merging_folds_what_is_in_use_in_its_order(name, names, s):
    model = ready(name)
    oftfx.use(model, names)
    oftfx.scale(model, s, names[-1])
    expected = output(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        merged, report = oftfx.merge(model, report=True)
    dropped = sorted({"a", "b", "c"} - set(names))
    assert [f"{dropped} is gone" in str(each.message) for each in told] == [True] * bool(dropped)
    testing.assert_close(output(merged), expected, str(names))
    assert report.adapters == tuple(names)
    assert ("in the order x met them" in str(report)) == (len(names) > 1)


def in_parts() -> nn.Module:
    """Two parts of a model that were adapted apart, each by a and b."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8)))
    for part in model.double():
        for name, spec in (("a", A), ("b", B)):
            oftfx.adapt(part, spec, name, capture="modules")
    return model


def test_named_adapters_fold_in_their_order_in_every_part():
    model = in_parts()
    oftfx.use(model[0], ["a", "b"])
    oftfx.use(model[1], ["b"])
    oftfx.use(model[1], ["b", "a"])
    expected = output(copy.deepcopy(model), ["a", "b"])
    assert not torch.allclose(output(model), expected, atol=1e-3)
    testing.assert_close(output(oftfx.merge(model, names=["a", "b"])), expected, "a, b")


def test_what_one_part_does_not_use_is_neither_folded_there_nor_lost_silently():
    model = in_parts()
    oftfx.use(model[1], "a")
    expected = output(model)
    with pytest.warns(oftfx.OftfxWarning, match=r"\['b'\] is gone from the model"):
        merged = oftfx.merge(model)
    testing.assert_close(output(merged), expected, "as they are in use")


_READY: dict[str, nn.Module] = {}


def ready(name: str) -> nn.Module:
    """A model of three adapters, a copy of the one that is built once."""
    if name not in _READY:
        _READY[name] = adapted(name=name)
        oftfx.adapt(_READY[name], HRA(rank=2, init_std=0.5), "c", x)
    return copy.deepcopy(_READY[name])


def test_merge_folds_the_named_and_leaves_what_is_in_use_alone_when_it_cannot():
    expected = output(adapted(), ["b", "a"])
    model = adapted()
    oftfx.use(model, "a")
    with pytest.raises(PlanError, match="'c'"):
        oftfx.merge(model, names=["b", "c"])
    with torch.no_grad():
        model[0].oft.b.theta[0] = float("nan")
        with pytest.raises(MergeError, match="not finite"):
            oftfx.merge(model, names=["b", "a"])
        assert [name for name, each in oftfx.adapters(model).items() if each.in_use] == ["a"]
        model[0].oft.b.theta.copy_(adapted()[0].oft.b.theta)
    testing.assert_close(output(oftfx.merge(model, names=["b", "a"])), expected, "merged")
    with (
        oftfx.disabled(off := adapted()),
        pytest.raises(MergeError, match="no adapter in use"),
    ):
        oftfx.merge(off)


@given(st.lists(st.sampled_from(["a", "b", "c", "ab", "ba", "", "off"]), min_size=1, max_size=8))
def test_switching_to_and_fro_changes_no_bit(path):
    model, expected, held = ready("tied"), {}, bits(ready("tied"))
    for step in (*path, *path):
        if step == "off":
            with oftfx.disabled(model):
                result = output(model, "c")
        else:
            result = output(model, list(step))
        assert torch.equal(result, expected.setdefault(step, result))
    assert torch.equal(output(model, []), output(small("tied")))
    now = bits(model)
    assert now.keys() == held.keys()
    assert all(torch.equal(now[key], held[key]) for key in held)


def test_disabled_gives_the_order_back():
    model = adapted()
    expected = output(model, ["b", "a"])
    with oftfx.disabled(model):
        oftfx.use(model, ["a", "b"])
    assert torch.equal(output(model), expected)
    with pytest.raises(PlanError, match="'c'"), oftfx.disabled(model, "c"):
        pass


def test_an_adapter_that_is_not_in_use_costs_nothing():
    alone = oftfx.adapt(small("attention"), A, example_inputs=x)
    model = adapted(A, A, "attention")
    for used in ("a", "b"):
        oftfx.use(model, used)
        assert ran(model) == ran(alone)  # the readers of one tensor are turned together again
        with torch.no_grad():
            assert ran(model, times=2) == ran(alone, times=2)


def test_what_is_in_use_trains_and_nothing_else():
    model = adapted(PSOFT(rank=4, init_std=0.1), B)
    oftfx.use(model, "b")
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    assert trained == {f"{i}.oft.b.{leaf}" for i in (0, 2) for leaf in ("theta", "magnitude")}
    assert len(oftfx.parameters(model)) == 4
    assert len(oftfx.parameters(model, "a")) == 6
    model(x).sum().backward()
    assert all(
        (value.grad is not None) == (key in trained) for key, value in model.named_parameters()
    )
    oftfx.use(model, "a")
    assert not model[0].oft.a.support.requires_grad
    assert all(value.requires_grad for value in oftfx.parameters(model))
    oftfx.use(model, [])
    with pytest.raises(
        PlanError, match=r"no adapter in use, of \['a', 'b'\]: oftfx.use\(model, 'a'\)"
    ):
        oftfx.parameters(model)


def test_health_penalty_and_explain_are_of_what_is_in_use_or_named():
    model = adapted(QGOFT(init_std=0.1, weight=1.0), OFT(block_size=4, init_std=0.1))
    oftfx.use(model, "b")
    assert oftfx.penalty(model) == 0 < oftfx.penalty(model, "a")
    assert len(oftfx.health(model).fqns) == 2
    assert {site.adapter for site in oftfx.explain(model).sites} == {"b"}
    assert {site.adapter for site in oftfx.explain(model, "a").sites} == {"a"}
    norm = oftfx.health(model).norm
    oftfx.scale(model, 0.5)
    torch.testing.assert_close(oftfx.health(model).norm, norm / 2)
    oftfx.use(model, [])
    for verb in (oftfx.health, oftfx.penalty, oftfx.project, oftfx.explain):
        with pytest.raises(PlanError, match="no adapter in use"):
            verb(model)


@pytest.mark.parametrize(
    ("names", "message"),
    [("c", r"no adapter 'c'; it has \['a', 'b'\]"), (["a", "a"], "twice"), (["a", None], "None")],
)
def test_names_that_make_no_sense_are_refused(names, message):
    model = adapted()
    before = output(model)
    with pytest.raises(PlanError, match=message):
        oftfx.use(model, names)
    assert torch.equal(output(model), before)


def test_a_graph_applies_what_it_holds():
    graph = fx.symbolic_trace(small("mlp"))
    oftfx.adapt(graph, A, "a")
    oftfx.adapt(graph, B, "b")
    program = export(adapted(), (x,))
    for held in (graph, program):
        assert list(oftfx.adapters(held)) == ["a", "b"]
        for verb in (
            lambda model: oftfx.use(model, "a"),
            lambda model: oftfx.scale(model, 0.5),
            lambda model: oftfx.interpolate(model, "a", "b", 0.5),
            lambda model: oftfx.rows(model, ["a"]).__enter__(),
        ):
            with pytest.raises(PlanError, match="a graph applies all that it holds"):
                verb(held)
        with pytest.raises(MergeError, match=r"oftfx\.remove"):
            oftfx.merge(held, names=["b", "a"])
    expected = output(adapted())
    _, report = oftfx.merge(graph, report=True, names=["a", "b"])
    assert report.adapters == ("a", "b")
    testing.assert_close(graph(x).detach(), expected, "the graph")


def test_an_exported_model_is_what_was_in_use_and_as_far():
    model = adapted(name="attention")
    oftfx.use(model, ["b", "a"])
    oftfx.scale(model, 0.5, "a")
    program = export(model, (x,))
    testing.assert_close(testing.run(program, x)[0].detach(), output(model), "exported")
    assert list(oftfx.adapters(program)) == ["b", "a"]
    testing.assert_folds(program, x)


# scaled


@every_spec
def test_scale_0_is_the_base_and_1_the_whole_bit_for_bit(spec):
    model = twins(spec)
    whole = output(model)
    oftfx.scale(model, 0)
    assert torch.equal(output(model), output(small(base_of(spec))))
    oftfx.scale(model, 1)
    assert torch.equal(output(model), whole)
    oftfx.scale(model, 0, "b")
    assert torch.equal(output(model), output(twins(spec), "a"))


@every_spec
def test_a_scaled_adapter_is_a_rotation_trains_and_folds(spec):
    model = twins(spec)
    oftfx.scale(model, 0.5)
    grads = testing.gradients(model, x)
    assert all(grad.isfinite().all() and grad.any() for grad in grads.values())
    if not (getattr(spec, "scale", False) or getattr(spec, "relaxed", False)):
        assert oftfx.health(model).orthogonality_error.max() < 1e-3
    testing.assert_folds(model, x)


def test_the_same_planes_are_turned_by_twice_the_arctangent():
    model = oftfx.adapt(
        nn.Linear(2, 2).double(), OFT(block_size=2, exact=True, init_std=0.3), capture="modules"
    )
    theta = float(model.oft.default.theta.detach())
    for s in (-1.0, 0.3, 2.0):
        oftfx.scale(model, s)
        turned = model.oft.default(torch.eye(2).double())[0].detach()
        angle = torch.atan2(turned[1], turned[0])
        torch.testing.assert_close(float(angle), 2 * torch.arctan(torch.tensor(s * theta)).item())


def test_half_of_a_pair_of_reflections_is_done_twice():
    torch.manual_seed(3)
    model = oftfx.adapt(
        nn.Linear(8, 8).double(), HRA(rank=2, init_std=2.0, dtype=torch.float64), capture="modules"
    )
    eye = torch.eye(8).double()
    whole = model.oft.default(eye).detach()
    oftfx.scale(model, 0.5)
    half = model.oft.default(eye).detach()
    torch.testing.assert_close(half @ half, whole)
    oftfx.scale(model, -1)
    torch.testing.assert_close(model.oft.default(eye).detach() @ whole, eye)


def test_an_equal_pair_of_reflections_is_the_identity_at_every_scale():
    model = oftfx.adapt(small("mlp"), HRA(rank=4), capture="modules")
    oftfx.scale(model, 0.3)
    assert torch.equal(output(model), output(small("mlp")))
    grads = testing.gradients(model, x)
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize("spec", FREE.values(), ids=FREE)
def test_a_free_map_has_no_way_to_it(spec):
    model = adapted(A, spec)
    with pytest.raises(PlanError, match=f"0: {type(spec).__name__} trains a free map"):
        oftfx.scale(model, 0.5)
    assert {adapter.scale for adapter in oftfx.adapters(model).values()} == {1.0}
    oftfx.scale(model, 0.5, "a")
    for s in (float("nan"), float("inf"), "1", None, True):
        with pytest.raises(PlanError, match="finite number"):
            oftfx.scale(model, s, "a")
    assert {n: adapter.scale for n, adapter in oftfx.adapters(model).items()} == {"a": 0.5, "b": 1}


def test_cores_are_kept_for_one_scale_only():
    model = adapted()
    half = [output(model)]
    for s in (0.5, 0.25, 0.5):
        oftfx.scale(model, s)
        half.append(output(model))
    assert torch.equal(half[1], half[3])
    assert not torch.equal(half[1], half[2])
    assert not torch.equal(half[0], half[1])


# in between


@pytest.mark.parametrize("spec", LINEAR.values(), ids=LINEAR)
def test_interpolation_ends_at_both_bit_for_bit(spec):
    model = twins(spec)
    before = output(model)
    oftfx.interpolate(model, "a", "b", 0, "start")
    oftfx.interpolate(model, "a", "b", 1, "end")
    assert torch.equal(output(model), before)
    assert torch.equal(output(model, "start"), output(model, "a"))
    assert torch.equal(output(model, "end"), output(model, "b"))


def test_half_way_between_is_the_mean_of_the_parameters():
    model = oftfx.interpolate(twins(OFT(block_size=4, init_std=0.2)), "a", "b", 0.5)
    for i in (0, 2):
        a, b, mix = (model[i].oft[name].theta for name in ("a", "b", "mix"))
        torch.testing.assert_close(mix, (a + b) / 2)
        assert not mix.requires_grad
    assert not oftfx.adapters(model)["mix"].in_use
    oftfx.use(model, "mix")
    testing.assert_folds(model, x)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (A, B, "specs of 'a' and 'b' differ"),
        (A, dataclasses.replace(A, targets="0"), "2 is adapted by 'a' otherwise"),
        (dataclasses.replace(A, targets="0"), A, "2 is adapted by 'b', but not by 'a'"),
        (HRA(rank=2), HRA(rank=2), "no generators"),
        (FREE["LOFT, free"], FREE["LOFT, free"], "no generators"),
        (LOFT(rank=4, support="random"), LOFT(rank=4, support="random", seed=1), "support of 'a'"),
    ],
)
def test_between_what_differs_in_more_than_parameters_is_nothing(a, b, message):
    model = adapted(a, b)
    held = bits(model)
    with pytest.raises(PlanError, match=message):
        oftfx.interpolate(model, "a", "b", 0.5)
    assert bits(model).keys() == held.keys()


def test_an_interpolation_needs_a_name_of_its_own():
    model = twins(A)
    with pytest.raises(PlanError, match="already"):
        oftfx.interpolate(model, "a", "b", 0.5, name="a")
    with pytest.raises(PlanError, match="twice"):
        oftfx.interpolate(model, "a", "a", 0.5)


# row by row


batch = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
WHICH = ["b", None, "a", "b"]


def apart(model: nn.Module, inputs: torch.Tensor, names) -> torch.Tensor:
    """Every row through its adapter alone."""
    out = []
    for row, name in zip(inputs, names, strict=True):
        oftfx.use(model, name or [])
        out.append(model(row[None])[0])
    return torch.stack(out)


@pytest.mark.parametrize("spec", (SPECS | FREE).values(), ids=SPECS | FREE)
def test_rows_are_what_each_adapter_makes_of_its_row(spec):
    model = twins(spec)
    expected = apart(model, batch, WHICH).detach()
    oftfx.use(model, ["b", "a"])
    before = output(model)
    with oftfx.rows(model, WHICH):
        together = model(batch).detach()
    # HRA's cores are float32, and solved in other batches.
    testing.assert_close(together, expected, "rows", within=1e-7 if type(spec) is HRA else None)
    assert torch.equal(together[1], small(base_of(spec))(batch)[1])
    assert torch.equal(output(model), before)


@pytest.mark.parametrize(("a", "b"), [(A, B), (A, HRA(rank=2, init_std=0.5)), (B, FREE["qGOFT"])])
def test_rows_of_different_methods_and_sites(a, b):
    model = adapted(dataclasses.replace(a, targets="0"), b)
    oftfx.scale(model, 0.5, "a")
    expected = apart(model, batch, WHICH).detach()
    with oftfx.rows(model, WHICH):
        testing.assert_close(model(batch).detach(), expected, "rows", within=1e-7)


@pytest.mark.parametrize("spec", [SPECS["OFT, shared"], SPECS["BOFT"], SPECS["PSOFT"]])
def test_gradients_of_rows_are_those_of_each_row_alone(spec):
    model, twin = twins(spec), twins(spec)
    total = 0.0
    for row, name in zip(batch, WHICH, strict=True):
        oftfx.use(twin, name or [])
        total = total + twin(row[None]).square().sum()
    total.backward()
    with oftfx.rows(model, WHICH):
        model(batch).square().sum().backward()
    for (key, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            testing.assert_close(ours.grad, theirs.grad, key, within=1e-6)


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=6), st.integers(1, 3))
def test_any_assignment_of_rows_tokens_and_beams(names, each):
    """A row's tensors lie one after the other, be they one, flattened tokens or beams."""
    model = ready("tied")
    generator = torch.Generator().manual_seed(len(names))
    inputs = torch.randn(len(names) * each, 3, 8, generator=generator, dtype=torch.float64)
    expected = apart(model, inputs, [name for name in names for _ in range(each)]).detach()
    with oftfx.rows(model, names), torch.no_grad():
        testing.assert_close(model(inputs), expected, "beams", within=1e-7)
        flat = model(inputs.flatten(0, 1))
        testing.assert_close(flat, expected.flatten(0, 1), "tokens", within=1e-7)


def test_rows_end_with_their_block_and_nest():
    model = adapted()
    expected = {name: output(model, name) for name in ("a", "b", ())}
    oftfx.use(model, "a")
    with oftfx.rows(model, ["a", "b"]):
        with oftfx.rows(model, ["b"]):
            testing.assert_close(output(model), expected["b"], "inside")
        testing.assert_close(output(model)[0], expected["a"][0], "outside")
        with oftfx.disabled(model):
            assert torch.equal(output(model), expected[()])
    with pytest.raises(ZeroDivisionError), oftfx.rows(model, ["b"]):
        1 / 0  # noqa: B018
    assert torch.equal(output(model), expected["a"])


def test_rows_that_do_not_fit_are_refused():
    model = adapted()
    for names, message in [("ab", "one adapter or None"), ([], "one adapter"), (["a", "d"], "'d'")]:
        with pytest.raises(PlanError, match=message), oftfx.rows(model, names):
            pass
    with oftfx.rows(model, ["a", "b", None]):
        with pytest.raises(PlanError, match=r"\(2, 3, 8\), whose first axis is no multiple"):
            model(x)
        with pytest.raises(PlanError, match="exclude the layer"):
            model(x[0, 0])
        with pytest.raises(Exception, match=r"oftfx\.use"):
            export(model, (batch[:3],))
    with pytest.raises(PlanError, match="folded into its weight on the fly"):
        oftfx.rows(adapted(name="functional"), ["a"]).__enter__()
    experts = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(8, 8)])})
    oftfx.adapt(experts, A, capture="modules")
    with pytest.raises(PlanError, match=r"experts\.0: 'default' adapts an expert"):
        oftfx.rows(experts, ["default"]).__enter__()


def test_rows_under_autocast():
    model, inputs = adapted(B, A).float(), batch.float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = apart(model, inputs, WHICH).detach()
        with oftfx.rows(model, WHICH):
            testing.assert_close(model(inputs).detach(), expected, "rows")


def llama_of_two() -> nn.Module:
    model = llama(layers=1)
    for name, seed in (("a", 1), ("b", 2)):
        oftfx.adapt(model, OFT(block_size=8, init_std=0.1, seed=seed), name, capture="modules")
    return model


def test_generate_with_an_adapter_for_each_row():
    model, ids = llama_of_two(), tokens(4, 5)["input_ids"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "attention_mask": torch.ones_like(ids)}
    with oftfx.rows(model, WHICH):
        together = [model.generate(ids, num_beams=beams, **options) for beams in (1, 2)]
    for i, name in enumerate(WHICH):
        oftfx.use(model, name or [])
        for beams, ours in zip((1, 2), together, strict=True):
            assert torch.equal(ours[i], model.generate(ids, num_beams=beams, **options)[i])


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_mixes_switches_and_scales():
    model, counter = adapted(A, A), torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    def agree():
        torch.testing.assert_close(compiled(batch), model(batch))

    for names in (WHICH, [None, "b", "a", "a"]):  # compiled once, whichever rows they are
        with oftfx.rows(model, names):
            agree()
    assert counter.frame_count == 1
    for names in (["a", "b"], ["b", "a"]):
        oftfx.use(model, names)
        agree()
    oftfx.use(model, "a")
    for s in (0.5, 0.25, 0.3):
        oftfx.scale(model, s)
        agree()
    assert counter.frame_count <= 5  # two of the scales share a graph that takes any


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_rows_through_the_backend():
    model, inputs = llama_of_two(), tokens(4, 5)
    compiled = torch.compile(model, fullgraph=True, backend="oftfx")
    with oftfx.rows(model, WHICH):
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


# kept and copied


def test_each_adapter_is_saved_and_loaded_by_its_name(tmp_path):
    model = adapted()
    oftfx.use(model, "a")
    oftfx.scale(model, 0.5)
    oftfx.save(model, tmp_path / "b", "b")
    with pytest.warns(oftfx.OftfxWarning, match=r"after oftfx.load, oftfx.scale\(model, 0.5\)"):
        oftfx.save(model, tmp_path / "a", "a")
    loaded = oftfx.load(small("mlp"), tmp_path / "b", "poetry")
    oftfx.load(loaded, tmp_path / "a", "prose")
    oftfx.scale(model, 1)  # is no part of what is saved
    for theirs, ours in (("poetry", "b"), ("prose", "a"), (["prose", "poetry"], ["a", "b"])):
        assert torch.equal(output(loaded, theirs), output(model, ours))
    alone = oftfx.adapt(small("mlp"), A, capture="modules")
    oftfx.save(model, tmp_path / "of two", "a", format="peft")
    oftfx.save(alone, tmp_path / "of one", format="peft")
    for file in (tmp_path / "of one").iterdir():
        assert (tmp_path / "of two" / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(PlanError, match=r"'default'; it has \['a', 'b'\]"):
        oftfx.save(model, tmp_path)


def test_a_state_dict_is_the_same_whatever_is_in_use():
    model, other = adapted(), adapted()
    keys = list(model.state_dict())
    oftfx.use(model, ["b", "a"])
    assert list(model.state_dict()) == keys
    assert [key for key, _ in model.named_parameters()] == [k for k, _ in other.named_parameters()]
    testing.randomize(other, 5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other, ["b", "a"]), output(model))


def test_a_copy_is_in_the_same_use():
    model = adapted()
    oftfx.use(model, ["b", "a"])
    oftfx.scale(model, 0.5, "a")
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin), output(model))
    assert oftfx.adapters(twin) == oftfx.adapters(model)
    oftfx.use(twin, "a")
    testing.randomize(twin, 3)
    assert not torch.equal(output(twin), output(model))
    assert list(oftfx.adapters(model)) == ["b", "a"]


def test_removing_all_leaves_nothing_behind():
    model, base = adapted(), small("mlp")
    oftfx.use(model, ["b", "a"])
    with oftfx.rows(model, ["a", "b"]):
        model(x)
    oftfx.remove(model)
    for ours, theirs in zip(model.modules(), base.modules(), strict=True):
        assert vars(ours).keys() == vars(theirs).keys()
        assert type(ours) is type(theirs)
    assert not list(rotations(model))


def test_a_part_that_was_adapted_first_is_met_first():
    """Whatever module the records are of."""
    x = rows(torch.float32)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 8)))
    oftfx.adapt(model[1], OFT(block_size=4, init_std=0.4, seed=1), "inner", example_inputs=x)
    oftfx.adapt(model, OFT(block_size=4, init_std=0.4, seed=2), "outer", example_inputs=x)
    expected = model(x)
    assert list(oftfx.adapters(model)) == ["inner", "outer"]
    oftfx.use(model, list(oftfx.adapters(model)))
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(oftfx.merge(model)(x), expected)


@pytest.mark.parametrize("name", [None, 5])
def test_a_name_that_is_no_text_is_refused(name):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(
        PlanError, match=f"name={name}: an adapter's name must be a plain identifier"
    ):
        oftfx.adapt(model, OFT(block_size=4), name, capture="modules")
    oftfx.adapt(model, OFT(block_size=4), capture="modules")
    with pytest.raises(PlanError, match=f"{name} names no adapter"):
        oftfx.use(model, name)


def test_adapters_of_different_layers_are_named_as_they_were_chosen():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for name, target in (("a", "0"), ("b", "1")):
        oftfx.adapt(model, OFT(block_size=4, targets=target), name, capture="modules")
    assert list(oftfx.adapters(model)) == ["a", "b"]
    oftfx.use(model, ["b", "a"])
    assert list(oftfx.adapters(model)) == ["b", "a"]
