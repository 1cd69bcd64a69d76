"""What holds for every method alike, on models of every kind and everywhere a model is run.

A new method is one more row of SPECS (and of COUNTS).
"""

import copy
import dataclasses
import functools

import pytest
import torch
from torch import fx, nn
from torch.export import Dim, export
from torch.profiler import ProfilerActivity, profile

import oftfx
from oftfx import BOFT, COFT, GOFT, HRA, LOFT, OFT, PSOFT, QGOFT, Spec, testing
from oftfx.rotations import num_trainable
from tests.small import rows, small

pytestmark = pytest.mark.usefixtures("fresh_compiler")

# Each fits widths of 8, 16 and 1024.
SPECS: dict[str, Spec] = {
    "OFT": OFT(block_size=4),
    "OFT, shared blocks": OFT(block_size=4, share_blocks=True),
    "OFT, magnitudes": OFT(block_size=4, magnitude=True, unit_rate=True),
    "OFT, doubled": OFT(block_size=4, order=3, doubled=True),
    "COFT": COFT(block_size=4, eps=0.1),
    "BOFT": BOFT(block_size=4, factors=2),
    "BOFT, dense": BOFT(block_size=2, factors=3, exact=True),
    "BOFT, shared": BOFT(block_size=4, share_blocks=True, magnitude=True),
    "GOFT": GOFT(),
    "GOFT, scaled": GOFT(scale=True),
    "QGOFT": QGOFT(),
    "QGOFT, scaled": QGOFT(scale=True),
    "HRA": HRA(rank=4, weight=0.01),
    "PSOFT": PSOFT(rank=4),
    "PSOFT, strict and exact": PSOFT(rank=3, relaxed=False, exact=True, svd="full"),
    "PSOFT, guarded": PSOFT(rank=5, guard="rescale", unit_rate=True),
    "LOFT, principal": LOFT(rank=4, support="principal", guard="exact"),
    "LOFT, random and free": LOFT(rank=3, support="random", core="free", unit_rate=True),
    "LOFT, coordinate": LOFT(rank=8, support="coordinate"),
}
FORMS = ("module", "graph", "program")

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def variants_slow(names) -> list:
    """Names of specs as parameters, all but the first of each method marked slow."""
    seen: set[type] = set()
    out = []
    for name in names:
        first = type(SPECS[name]) not in seen
        seen.add(type(SPECS[name]))
        out.append(pytest.param(name, marks=() if first else pytest.mark.slow))
    return out


every_spec_named = pytest.mark.parametrize("spec_name", variants_slow(SPECS))
"""For what takes a second or more: the default suite runs one spec of each method."""
every_form = pytest.mark.parametrize("form", FORMS)

x = rows()


def exported(model: nn.Module, inputs: torch.Tensor = x):
    return export(model, (inputs,), dynamic_shapes=({0: Dim("batch", min=2)},))


@functools.cache  # adapting a program leaves it as it is
def program(name: str, dtype: torch.dtype):
    return exported(small(name, dtype), rows(dtype))


def base(name: str, form: str, dtype: torch.dtype = torch.float64):
    if form == "program":
        return program(name, dtype)
    model = small(name, dtype)
    return fx.symbolic_trace(model) if form == "graph" else model


def adapted(name: str, spec: Spec, form: str = "module", seed: int | None = 0):
    """A small model, adapted and turned away from the identity (not for a seed of None)."""
    given = x if form == "module" else None
    model = oftfx.adapt(base(name, form), at_double(spec), example_inputs=given)
    return model if seed is None else testing.randomize(model, seed, 0.2)


def at_double(spec: Spec) -> Spec:
    return dataclasses.replace(spec, dtype=torch.float64)


@every_spec
@pytest.mark.parametrize(
    ("name", "form", "dtype"),
    [
        ("mlp", "module", torch.float32),
        ("mlp", "module", torch.bfloat16),
        ("functional", "module", torch.float16),
        ("mlp", "graph", torch.bfloat16),
        ("mlp", "program", torch.float64),
    ],
)
def test_adapting_does_not_change_one_bit(spec, name, form, dtype):
    testing.assert_identity_at_init(base(name, form, dtype), spec, rows(dtype))


@every_spec_named
@pytest.mark.parametrize("name", ["attention", "functional"])
def test_every_form_computes_the_same_in_value_and_gradient(spec_name, name):
    spec = SPECS[spec_name]
    module = adapted(name, spec)
    assert not torch.allclose(testing.run(module, x)[0], testing.run(small(name), x)[0], atol=1e-3)
    for form in FORMS[1:]:
        testing.assert_same_function(adapted(name, spec, form), module, x)
    testing.assert_same_function(exported(module), module, x)


@every_spec
def test_gradcheck(spec):
    model = adapted("attention", spec)
    names = list(testing.thetas(model))

    def run(value, *thetas):
        return torch.func.functional_call(model, dict(zip(names, thetas, strict=True)), (value,))

    thetas = [value.detach().clone().requires_grad_() for value in testing.thetas(model).values()]
    inputs = (x.clone().requires_grad_(), *thetas)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, atol=1e-6)


@every_spec_named
def test_compiled_without_a_graph_break_is_eager(spec_name):
    spec = SPECS[spec_name]
    model = adapted("mlp", spec)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    testing.assert_same_function(compiled, model, x)


@every_spec
def test_autocast_does_not_take_digits_from_the_parameters(spec):
    """The cores, the folded weight and the penalty are those of float32."""
    start = dataclasses.replace(spec, init_std=0.2)
    model = oftfx.adapt(small("mlp", torch.float32), start, example_inputs=rows(torch.float32))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        penalty = oftfx.penalty(model)
        found = [core for _, r in oftfx.modules.rotations(model) for core in r.cores()]
    copied = copy.deepcopy(model)  # which keeps no cores
    expected = [core for _, r in oftfx.modules.rotations(copied) for core in r.cores()]
    for core, other in zip(found, expected, strict=True):
        assert torch.equal(core, other)
        assert core.dtype == torch.float32
    torch.testing.assert_close(penalty, oftfx.penalty(model).detach(), rtol=0, atol=0)


@every_spec
@pytest.mark.slow
def test_compiled_by_inductor(spec):
    model = adapted("mlp", spec)
    testing.assert_same_function(torch.compile(copy.deepcopy(model)), model, x)


@every_spec
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "module") for name in ("mlp", "conv1d", "functional", "twice used", "tied")),
        ("mlp", "graph"),
        ("conv1d", "program"),
    ],
)
def test_folded_is_unfolded(spec, name, form):
    testing.assert_folds(adapted(name, spec, form), x)


@every_spec_named
def test_folded_is_unfolded_for_an_export_of_the_adapted_module(spec_name):
    spec = SPECS[spec_name]
    testing.assert_folds(exported(adapted("mlp", spec)), x)


@every_spec
@every_form
def test_two_adapters_fold_in_reverse(spec, form):
    model = adapted("mlp", spec, form)
    second = dataclasses.replace(at_double(spec), seed=7)
    model = oftfx.adapt(model, second, "second", x if form == "module" else None)
    testing.assert_folds(testing.randomize(model, 5, 0.2), x)


@every_spec
@every_form
def test_removing_gives_the_base_back(spec, form):
    model = oftfx.remove(adapted("mlp", spec, form))
    testing.assert_same_function(model, small("mlp"), x, within=0)


@every_spec
@pytest.mark.parametrize(
    ("form", "into"), [("module", "program"), ("graph", "module"), ("program", "graph")]
)
def test_saved_is_loaded_into_any_form(spec, form, into, tmp_path):
    model = adapted("mlp", spec, form)
    oftfx.save(model, tmp_path)
    loaded = oftfx.load(base("mlp", into), tmp_path)
    testing.assert_same_function(loaded, model, x)


@every_spec
@every_form
def test_training_moves_every_rotation_and_nothing_else(spec, form):
    called = testing.callable_of(adapted("mlp", spec, form, seed=None))
    frozen = {n: p.detach().clone() for n, p in called.named_parameters() if not p.requires_grad}
    before = {n: p.detach().clone() for n, p in testing.thetas(called).items()}
    optimizer = torch.optim.Adam(oftfx.parameters(called), lr=0.01)
    target = testing.run(small("mlp"), x.roll(1, -1))[0].detach()
    losses = []
    for _ in range(8):
        loss = (testing.run(called, x)[0] - target).square().mean() + oftfx.penalty(called)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        oftfx.project(called)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = testing.thetas(called)
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    for name, value in frozen.items():
        assert torch.equal(called.get_parameter(name), value), name


@every_spec_named
@pytest.mark.parametrize(("name", "strict"), [("mlp", True), ("functional", False)])
def test_an_export_of_the_adapted_module_knows_its_spec(spec_name, strict, name):
    spec = SPECS[spec_name]
    model = adapted(name, spec)
    program = export(model, (x,), strict=strict)
    for other in (program, program.module(), program.run_decompositions()):
        a, b = oftfx.health(model), oftfx.health(other)
        assert set(a.fqns) == set(b.fqns)
        assert sorted(a.norm.tolist()) == sorted(b.norm.tolist())
        assert oftfx.penalty(other).item() == pytest.approx(oftfx.penalty(model).item())


@every_spec
def test_health_is_the_same_for_every_form_and_true(spec):
    model = adapted("mlp", spec)
    found = [oftfx.health(model), *(oftfx.health(adapted("mlp", spec, f)) for f in FORMS[1:])]
    for other in found[1:]:
        assert other.fqns == found[0].fqns
        assert torch.equal(other.norm, found[0].norm)
        assert torch.equal(other.orthogonality_error, found[0].orthogonality_error)
    for (_, rotation), error in zip(
        oftfx.modules.rotations(model), found[0].orthogonality_error, strict=True
    ):
        defect = max(factor.defect().item() for factor in rotation.factors())
        assert float(error) == pytest.approx(defect, rel=0.1, abs=1e-12)


@every_spec
def test_never_a_matrix_as_wide_as_the_input(spec):
    """The largest tensor of a training step, inside the ops too, and of a fold."""
    width = 1024
    model = nn.Sequential(nn.Linear(width, 4, bias=False))
    oftfx.adapt(model, spec, capture="modules")
    testing.randomize(model)
    inputs = torch.randn(4, width, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        model(inputs).square().sum().backward()
        oftfx.merge(model)
    largest = max(event.self_cpu_memory_usage for event in measured.events())
    assert 0 < largest < width * width * 4 / 8


ORTHOGONAL = {
    "OFT": OFT(block_size=4, exact=True),
    "OFT, shared blocks": OFT(block_size=4, exact=True, share_blocks=True),
    "COFT": COFT(block_size=4, exact=True),
    "BOFT": BOFT(block_size=4, factors=2, exact=True),
    "GOFT": GOFT(),
    "HRA": HRA(rank=4),
    "PSOFT, strict": PSOFT(rank=5, relaxed=False, exact=True),
    "LOFT": LOFT(rank=5, support="random", exact=True),
}


@pytest.mark.parametrize("spec", ORTHOGONAL.values(), ids=ORTHOGONAL)
def test_rows_of_the_weight_keep_their_norms_and_angles(spec):
    """And with them its singular values and its hyperspherical energy."""
    model, base = adapted("mlp", spec), small("mlp")
    merged = oftfx.merge(model)
    for i in (0, 2):
        before, after = base[i].weight.detach(), merged[i].weight.detach()
        assert (after - before).norm() > 0.05 * before.norm()
        torch.testing.assert_close(after @ after.mT, before @ before.mT)
        singular = torch.linalg.svdvals
        torch.testing.assert_close(singular(after), singular(before))
        torch.testing.assert_close(energy(after), energy(before))


def energy(weight: torch.Tensor) -> torch.Tensor:
    """``Σ_{i≠j} ‖ŵ_i − ŵ_j‖⁻¹`` of the rows at length one."""
    return (1 / torch.pdist(torch.nn.functional.normalize(weight, dim=1))).sum()


def test_magnitudes_change_the_norms_and_keep_the_angles():
    model, base = adapted("mlp", OFT(block_size=4, exact=True, magnitude=True)), small("mlp")
    scales = [1 + model[i].oft.default.magnitude.detach() for i in (0, 2)]
    merged = oftfx.merge(model)
    for i, scale in zip((0, 2), scales, strict=True):
        before, after = base[i].weight.detach(), merged[i].weight.detach()
        torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1) * scale.abs())
        same = scale.sign()
        turned = torch.nn.functional.normalize(after, dim=1) * same[:, None]
        torch.testing.assert_close(energy(turned), energy(before))


# Trainable numbers of a linear layer with 4096 inputs.
COUNTS = {
    OFT(block_size=32): 63_488,
    OFT(block_size=32, share_blocks=True): 496,
    COFT(block_size=32): 63_488,
    BOFT(block_size=8, factors=1): 14_336,
    BOFT(block_size=8, factors=4): 57_344,
    GOFT(): 4_095,
    GOFT(scale=True): 8_191,
    QGOFT(): 16_380,
    QGOFT(scale=True): 20_476,
    HRA(rank=8): 32_768,
    PSOFT(rank=46): 1_127,
    PSOFT(rank=46, relaxed=False): 1_035,
    LOFT(rank=46): 1_035,
    LOFT(rank=46, core="free"): 2_116,
}


@pytest.mark.parametrize(("spec", "count"), COUNTS.items(), ids=map(repr, COUNTS))
def test_counts_of_trainable_numbers(spec, count):
    assert num_trainable(spec, 4096) == count
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 8))
    assert oftfx.plan(model, spec, capture="modules").num_trainable == count
