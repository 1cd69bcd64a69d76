"""Calibration finds the directions the loss asks for, in little memory, and leaves no trace."""

import contextlib
import copy
import gc
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import export
from torch.utils._python_dispatch import TorchDispatchMode

import oftfx
from oftfx import LOFT, OFT, PSOFT, PlanError, testing
from oftfx.calibrate import sketch_bytes
from oftfx.probe import ROWS
from tests.small import SMALL, Attention, llama, rows, small, tokens

FORMS = ("module", "graph", "program")
SKEW = LOFT(rank=4, dtype=torch.float64)
GRADIENT = LOFT(rank=4, support="gradient", dtype=torch.float64)
both = pytest.mark.parametrize("spec", [SKEW, GRADIENT], ids=["skew", "gradient"])

X = rows()
BATCHES = [X, X.roll(1, 0) + 0.5, 2 * X.flip(1)]


def loss(output: Tensor, batch: Tensor) -> Tensor:
    return (output * torch.arange(output.numel()).view_as(output)).sum() / 100


def as_form(model: nn.Module, form: str):
    if form == "graph":
        return fx.symbolic_trace(model)
    return export(model, (X,)) if form == "program" else model


def calibrated(model, spec, form: str = "module", batches=BATCHES):
    example = X if form == "module" else None
    return oftfx.calibrate(as_form(model, form), spec, batches, loss, example_inputs=example)


def dense(model: nn.Module, name: str) -> dict[str, Tensor]:
    """S or G of every planned site, by autograd's own weight gradients."""
    model = copy.deepcopy(model).train()
    # Untied, so that each site has the gradient of its own use.
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(parameter.detach().clone())
    sum(loss(model(batch), batch) for batch in BATCHES).backward()
    out = {}
    for site in oftfx.plan(model, OFT(block_size=2), X).sites:
        weight = model.get_parameter(site.weight)
        w, g = (t if site.layout == "out_in" else t.mT for t in (weight.detach(), weight.grad))
        out[site.fqn] = g if name == "gradient" else 0.5 * (w.mT @ g - g.mT @ w)
    return out


def missed(support: Tensor, matrix: Tensor) -> float:
    """The share of the best rows' energy that a support of as many does not hold."""
    best = torch.linalg.svdvals(matrix)[: len(support)].square().sum()
    return float(1 - (matrix @ support.mT.to(matrix)).square().sum() / best)


@both
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SMALL)
def test_directions_are_those_of_the_dense_gradient(spec, form, name):
    model = small(name)
    if name == "tied" and form != "module":
        model.b.weight = nn.Parameter(model.a.weight.detach().clone())
    found = calibrated(model, spec, form)
    matrices = dense(model, spec.support)
    assert found.supports.keys() == matrices.keys()
    for fqn, matrix in matrices.items():
        assert missed(found.supports[fqn], matrix) <= 0.01, fqn
        total = float(matrix.square().sum())
        if matrix.shape[1] == 8:  # the sketch is as wide as the input, so it is exact
            assert found.totals[fqn] == pytest.approx(total)
            energies = torch.linalg.svdvals(matrix)[:4].square()
            torch.testing.assert_close(found.energies[fqn], energies, rtol=1e-6, atol=1e-12)


@both
def test_every_form_finds_the_same(spec):
    module, *others = (calibrated(small("attention"), spec, form) for form in FORMS)
    for other in others:
        for fqn, support in module.supports.items():
            torch.testing.assert_close(other.supports[fqn], support, rtol=0, atol=1e-9)
            assert other.totals[fqn] == pytest.approx(module.totals[fqn])


@both
def test_sites_that_share_a_rotation_are_one_layer(spec):
    shared = LOFT(rank=4, support=spec.support, share_inputs=True, dtype=torch.float64)
    found = calibrated(small("attention"), shared)
    matrices = dense(small("attention"), spec.support)
    assert list(found.supports) == ["q", "out"]
    parts = [matrices[name] for name in "qkv"]
    together = sum(parts) if spec.support == "skew" else torch.cat(parts)
    assert missed(found.supports["q"], together) <= 1e-9


@both
def test_a_second_adapter_is_calibrated_on_the_input_that_the_first_turned(spec):
    model = oftfx.adapt(small("attention"), OFT(block_size=4, init_std=0.3), example_inputs=X)
    found = calibrated(model, spec)
    folded = oftfx.merge(copy.deepcopy(model))
    first = model.q.oft.default.factors()[0].operands[0].detach().double()
    turn = torch.eye(8, dtype=torch.float64) + torch.block_diag(*first)
    # G of the base's weight: that of the folded one, whose rows it turns, turned with them.
    gradient = dense(folded, "gradient")["q"] @ turn
    weight = model.q.weight.detach()
    product = weight.mT @ gradient
    matrix = gradient if spec.support == "gradient" else 0.5 * (product - product.mT)
    assert missed(found.supports["q"], matrix) <= 1e-6


@both
@pytest.mark.parametrize("form", FORMS)
def test_adapt_calibrates_trains_saves_folds(spec, form, tmp_path):
    model = as_form(small("attention"), form)
    example = X if form == "module" else None
    adapted = oftfx.adapt(model, spec, example_inputs=example, calibration=BATCHES, loss=loss)
    testing.assert_same_function(adapted, small("attention"), X, within=0, grad=False)
    testing.randomize(adapted)
    oftfx.save(adapted, tmp_path)
    for into in FORMS:
        loaded = oftfx.load(as_form(small("attention"), into), tmp_path)
        testing.assert_same_function(loaded, adapted, X)
    testing.assert_folds(adapted, X)


def test_a_calibration_is_made_once_and_used_for_smaller_ranks():
    found = calibrated(small("attention"), SKEW)
    spec = LOFT(rank=2, dtype=torch.float64)
    model = oftfx.adapt(small("attention"), spec, example_inputs=X, calibration=found)
    assert torch.equal(model.q.oft.default.support, found.supports["q"][:2])


def test_a_language_model_gives_its_own_loss():
    batch = {**tokens(), "labels": tokens()["input_ids"]}
    model = llama()
    skew = oftfx.adapt(llama(), LOFT(rank=4), calibration=[batch, batch])
    random = oftfx.adapt(llama(), LOFT(rank=4, support="random"))
    before = float(model(**batch).loss)
    gains = []
    for adapted in (skew, random):
        optimizer = torch.optim.SGD(oftfx.parameters(adapted), lr=1e-2)
        adapted(**batch).loss.backward()
        optimizer.step()
        gains.append(before - float(adapted(**batch).loss))
    assert gains[0] > 3 * gains[1] > 0


@pytest.mark.parametrize(
    "batches",
    [
        [X, X],
        [(X,), [X]],
        [{"x": X}],
        iter([X]),
        ((X,) for _ in range(2)),
    ],
    ids=["tensors", "tuples", "dicts", "iterator", "generator"],
)
def test_batches_as_models_take_them(batches):
    assert calibrated(small("attention"), SKEW, batches=batches).supports


@both
def test_bf16_models_are_sketched_in_float32(spec):
    model = small("attention", torch.bfloat16)
    batches = [batch.bfloat16() for batch in BATCHES]
    found = oftfx.calibrate(model, spec, batches, loss, example_inputs=batches[0])
    exact = dense(small("attention"), spec.support)
    for fqn, support in found.supports.items():
        assert support.dtype == torch.float32
        assert missed(support, exact[fqn]) <= 0.05


def test_autocast_and_compiled_layers():
    model = small("attention", torch.float32)
    for layer in model.children():
        layer.compile(backend="aot_eager")
    x = X.float()
    model(x)  # compiled before the probes came
    with torch.autocast("cpu", torch.bfloat16):
        found = oftfx.calibrate(model, SKEW, [x], loss, capture="modules")
    exact = oftfx.calibrate(small("attention", torch.float32), SKEW, [x], loss, capture="modules")
    for fqn, support in found.supports.items():
        ratio = float((support @ exact.supports[fqn].mT).square().sum()) / 4
        assert ratio >= 0.9


def test_with_checkpointed_blocks():
    batch = {**tokens(), "labels": tokens()["input_ids"]}
    plain, checkpointed = llama(), llama()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    a, b = (oftfx.calibrate(model, LOFT(rank=4), [batch]) for model in (plain, checkpointed))
    for fqn, support in a.supports.items():
        torch.testing.assert_close(b.supports[fqn], support, rtol=0, atol=1e-3)


def test_every_pass_sees_the_same_dropout():
    """Else the passes would be of different matrices, and nothing would be exact."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).double()
    torch.manual_seed(3)
    found = oftfx.calibrate(model, SKEW, [X], loss, example_inputs=X)
    torch.manual_seed(3)
    model.train()
    loss(model(X), X).backward()
    for fqn in ("0", "2"):
        weight = model.get_submodule(fqn).weight
        product = weight.detach().mT @ weight.grad
        matrix = 0.5 * (product - product.mT)
        energies = torch.linalg.svdvals(matrix)[:4].square()
        torch.testing.assert_close(found.energies[fqn], energies, rtol=1e-6, atol=1e-12)


# Without a trace.


class Noisy(nn.Module):
    """Everything that calibration could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(8, 8)
        self.w = nn.Parameter(torch.randn(8, 8))
        self.fc1.weight.requires_grad_(False)
        self.drop.eval()
        self.norm.train()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.fc2(self.drop(torch.relu_(self.norm(self.fc1(x))))), self.w)


def state_of(model: nn.Module):
    return {
        "classes": [(name, type(module)) for name, module in model.named_modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "modes": [module.training for module in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "random": torch.get_rng_state(),
    }


def same(a, b) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@both
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_also_when_it_fails(spec, form, fails):
    x = X.flatten(0, 1)
    model = Noisy().double().eval()
    model(x).sum().backward()
    model.norm.train()
    given = model
    if form == "graph":
        given = model = fx.symbolic_trace(model)
    elif form == "program":  # which shares the module's tensors
        given = export(model, (x,))
    before, calls = state_of(model), []
    code = model.code if form == "graph" else None

    def loss_of(output, batch):
        calls.append(output)
        if fails and len(calls) == 3:
            raise RuntimeError("in the middle")
        return output.square().sum()

    plan = oftfx.plan(given, spec, x if form == "module" else None)
    caught = pytest.raises(RuntimeError, match="in the middle") if fails else None
    with caught or contextlib.nullcontext():
        oftfx.calibrate(given, plan, [x, x + 1], loss_of)
    assert len(calls) >= 3
    assert same(before, state_of(model))
    assert code == (model.code if form == "graph" else None)


def test_a_bar_counts_the_batches_of_every_pass(monkeypatch):
    seen = []

    def tracked(items, what):
        seen.append((len(items), what))
        return items

    monkeypatch.setattr(sys.modules["oftfx.calibrate"], "tracked", tracked)
    calibrated(small("mlp"), SKEW)
    assert seen == [(3 * len(BATCHES), "calibrating")]


def test_the_loss_is_taken_in_train_mode():
    seen = []

    class Watching(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).double().eval()
    model[1].register_forward_hook(lambda module, args, out: seen.append(module.training))
    oftfx.calibrate(model, SKEW, [X], loss, example_inputs=X)
    assert seen[-3:] == [True] * 3


# Memory.


class Sizes(TorchDispatchMode):
    """The largest tensor that any op makes, and the most bytes that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in flat(args) if isinstance(t, Tensor)}
        for tensor in flat(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
            self.largest = max(self.largest, tensor.numel())
            if address in given or address in self.known or not size:
                continue
            self.known.add(address)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, address, size)
        return out

    def _gone(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.live -= size


def flat(value):
    return torch.utils._pytree.tree_leaves(value)


def wide(width: int = 768, depth: int = 2) -> nn.Module:
    """Wide inputs and few outputs, so that a weight is far smaller than in×in."""
    torch.manual_seed(0)
    pairs = [(nn.Linear(width, 48), nn.Tanh(), nn.Linear(48, width)) for _ in range(depth)]
    return nn.Sequential(*(layer for pair in pairs for layer in pair))


@pytest.mark.parametrize("support", ["skew", "gradient", "principal", "random", "coordinate"])
def test_never_a_matrix_as_wide_as_the_input_on_both_sides(support):
    model, x = wide(), torch.randn(4, 768)
    spec = LOFT(rank=6, support=support)
    plan = oftfx.plan(model, spec, x)
    needed = {"calibration": [x], "loss": lambda out, batch: out.square().sum()}
    with Sizes() as sizes:
        oftfx.adapt(model, plan, **(needed if support in ("skew", "gradient") else {}))
        model(x).sum().backward()
        oftfx.merge(model)
    assert 768 * 48 <= sizes.largest < 768 * 768 / 8


def test_psoft_never_makes_a_matrix_as_wide_as_the_input_on_both_sides():
    model, x = wide(), torch.randn(4, 768)
    for svd in ("randomized", "full"):
        plan = oftfx.plan(model, PSOFT(rank=6, svd=svd), x)
        with Sizes() as sizes:
            oftfx.adapt(model, plan)
            model(x).sum().backward()
            oftfx.remove(model)
        assert 768 * 48 <= sizes.largest < 768 * 768 / 8


@pytest.mark.parametrize("support", ["skew", "gradient"])
def test_the_extra_memory_is_within_what_is_stated(support, monkeypatch):
    """Besides what a training step holds: the inputs of the sites and the gradients."""
    for module in ("probe", "calibrate"):  # the fewer rows at a time, the sharper the bound
        monkeypatch.setattr(sys.modules[f"oftfx.{module}"], "ROWS", 16)
    model, x = wide(depth=8), torch.randn(64, 768)
    plan = oftfx.plan(model, LOFT(rank=6, support=support), x)

    def loss_of(out, batch):
        return out.square().sum()

    with Sizes() as step:
        twin = oftfx.adapt(copy.deepcopy(model), LOFT(rank=6, support="random"), capture="modules")
        step.peak = step.live
        base = step.live
        loss_of(twin(x), x).backward()
    with Sizes() as calibrating:
        found = oftfx.calibrate(model, plan, [x, x], loss_of)
    outcome = sum(4 * support.numel() for support in found.supports.values())
    extra = calibrating.peak - (step.peak - base) - outcome
    assert sketch_bytes(plan) / 3 <= extra <= sketch_bytes(plan)


@pytest.mark.parametrize("form", ["module", "graph"])
def test_sketches_do_not_wait_for_the_garbage_collector(form, monkeypatch):
    module, held = sys.modules["oftfx.calibrate"], weakref.WeakSet()
    make = module._sketch

    def made(*args):
        held.add(sketch := make(*args))
        return sketch

    monkeypatch.setattr(module, "_sketch", made)
    gc.disable()
    try:
        calibrated(small("attention"), SKEW, form)
        assert not held
    finally:
        gc.enable()


def test_the_stated_memory_of_a_language_model_is_a_small_part_of_its_gradients():
    with torch.device("meta"):
        layers = [nn.Linear(4096, 4096) for _ in range(224)]
    plan = oftfx.plan(nn.Sequential(*layers), LOFT(rank=46), capture="modules")
    assert sketch_bytes(plan) < 0.04 * 224 * 4 * 4096**2
    columns = 46 + 16
    held = 4 * 2 * 4096 * columns
    assert sketch_bytes(plan) == 224 * held + max(3 * held, 4 * ROWS * (2 * 4096 + columns))


# What it tells.


def test_the_report_is_a_table():
    text = str(calibrated(small("attention"), SKEW))
    assert text.splitlines()[0].split() == ["site", "width", "rank", "captured"]
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["q", "k", "v", "out"]
    assert "%" in text


def test_ranks_within_a_budget_capture_most():
    spec = LOFT(rank=8, dtype=torch.float64)
    model = small("attention")
    found = calibrated(model, spec)
    full = 4 * 28
    assert found.within(full).num_trainable == full
    captured = []
    for budget in (4, 20, 60, full):
        plan = found.within(budget)
        assert plan.num_trainable <= budget
        ranks = {site.fqn: plan.spec_of(site).rank for site in plan.sites}
        assert all(rank % 2 == 0 and rank >= 2 for rank in ranks.values())
        captured.append(
            sum(found.captured(fqn, rank) * found.totals[fqn] for fqn, rank in ranks.items())
        )
        again = oftfx.Plan.from_json(plan.to_json())
        adapted = oftfx.adapt(small("attention"), again, calibration=found)
        assert sum(p.numel() for p in oftfx.parameters(adapted)) == plan.num_trainable
    assert captured == sorted(captured)
    # No other ranks of at most this cost capture more, but for what a next plane did not fit.
    plan = found.within(20)
    ranks = {site.fqn: plan.spec_of(site).rank for site in plan.sites}
    uniform = sum(found.captured(fqn, 2) * found.totals[fqn] for fqn in ranks)
    assert captured[1] > uniform


def test_a_budget_for_shared_rotations():
    spec = LOFT(rank=8, share_inputs=True, dtype=torch.float64)
    found = calibrated(small("attention"), spec)
    plan = found.within(10)
    assert plan.num_trainable <= 10
    model = oftfx.adapt(small("attention"), plan, calibration=found)
    testing.assert_folds(testing.randomize(model), X)


def test_a_budget_below_a_plane_a_site_is_refused():
    with pytest.raises(PlanError, match=r"a budget of 3 .* less than one plane a site takes: 4"):
        calibrated(small("attention"), SKEW).within(3)


# Bad input.


@both
def test_sites_that_no_gradient_reaches_are_named(spec):
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(8, 8)
            self.dead = nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x) + 0 * self.dead(x)

    model = Dead().double()
    before = state_of(model)
    told = r"no gradient came to 1 of 2 rotations \(dead\)"
    with pytest.raises(PlanError, match=told):
        oftfx.adapt(model, spec, example_inputs=X, calibration=BATCHES, loss=loss)
    assert same(before, state_of(model))


@both
def test_zero_gradients_are_refused(spec):
    with pytest.raises(PlanError, match="no gradient came to 2 of 2"):
        oftfx.calibrate(small("mlp"), spec, [X], lambda out, b: 0 * out.sum(), example_inputs=X)


@pytest.mark.parametrize(
    ("batches", "loss_of", "told"),
    [
        ([], loss, "no batch"),
        ([X], None, "no scalar.*pass loss="),
        ([X], lambda out, batch: None, "None, no scalar"),
        ([X * float("nan")], loss, "loss is nan"),
        ([X], lambda out, batch: out.detach().sum(), "depends on no site"),
        ([X], lambda out, batch: torch.where(out > -9, out, out).sum() * 1e308 * 10, "inf"),
    ],
)
def test_a_loss_or_batches_that_are_of_no_use(batches, loss_of, told):
    with pytest.raises(PlanError, match=told):
        oftfx.calibrate(small("mlp"), SKEW, batches, loss_of, example_inputs=X)


def test_a_spec_that_needs_none_is_refused():
    with pytest.raises(PlanError, match="nothing to calibrate"):
        calibrated(small("mlp"), LOFT(rank=2, support="random"))


def test_another_plans_calibration_is_refused():
    found = calibrated(small("attention"), SKEW)
    for model, spec, told in (
        (Attention().double(), GRADIENT, "calibrated for support='skew' and rank=4"),
        (Attention().double(), LOFT(rank=6), "rank=4, not for .* rank=6"),
        (small("mlp"), SKEW, "another plan's"),
    ):
        with pytest.raises(PlanError, match=told):
            oftfx.adapt(model, spec, example_inputs=X, calibration=found)
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(PlanError, match="not in this model"):
        oftfx.calibrate(small("mlp"), oftfx.plan(Attention().double(), SKEW, X), [X], loss)


def test_a_model_on_meta_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(PlanError, match="on `meta`"):
        oftfx.calibrate(model, SKEW, [X], loss, capture="modules")
