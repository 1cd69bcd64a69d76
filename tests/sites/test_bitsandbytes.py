"""QOFT on bitsandbytes: 4-bit and int8 layers are rotated, trained, folded and left alone."""

import copy
import io
import warnings

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import oftfx
from oftfx import OFT, MergeError, OftfxWarning, PlanError, sites, testing
from oftfx.sites import bitsandbytes as provider
from tests.quantised import (
    assert_rounded,
    assert_unchanged,
    dequantised,
    float_llama,
    floats,
    linear4bit,
    linear8bit,
    most_rounding,
    quantised,
    quantised_llama,
    stored,
)
from tests.small import rows, tokens

SPEC = OFT(block_size=8, init_std=0.1)
LAYERS = {
    "nf4": lambda linear: linear4bit(linear),
    "nf4 once": lambda linear: linear4bit(linear, double=False),
    "fp4": lambda linear: linear4bit(linear, "fp4"),
    "fp4 once, blocks of 32": lambda linear: linear4bit(linear, "fp4", False, 32),
    "nf4 in bfloat16 storage": lambda linear: linear4bit(linear, storage=torch.bfloat16),
    "int8": linear8bit,
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
both_widths = pytest.mark.parametrize("make", [linear4bit, linear8bit], ids=["4 bit", "8 bit"])


def train(model: nn.Module, steps: int = 3) -> list[float]:
    optimizer = torch.optim.Adam(oftfx.parameters(model), lr=0.01)
    losses = []
    for _ in range(steps):
        loss = model(**tokens(), labels=tokens()["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def shapes_of(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Of all that is stored but JSON text, whose length varies."""
    held = stored(model).items()
    return {key: (v.shape, v.dtype) for key, v in held if "bitsandbytes__" not in key}


# --- planning ---


@every_layer
def test_every_quantised_layer_is_a_site(make):
    model = quantised_llama(make)
    plan, float_plan = oftfx.plan(model, SPEC), oftfx.plan(float_llama(), SPEC)
    expected = "linear8bit" if make is linear8bit else "linear4bit"
    assert {site.kind for site in plan.sites} == {expected}
    assert [(s.fqn, s.shape, s.group) for s in plan.sites] == [
        (s.fqn, s.shape, s.group) for s in float_plan.sites
    ]
    assert [skip.name for skip in plan.skipped] == [skip.name for skip in float_plan.skipped]
    by_modules = oftfx.plan(model, SPEC, capture="modules")
    assert [(s.fqn, s.shape, s.kind) for s in by_modules.sites] == [
        (s.fqn, s.shape, s.kind) for s in plan.sites
    ]


def test_planning_leaves_the_model_as_it_is():
    model = quantised_llama(linear4bit)
    before = stored(model)
    oftfx.plan(model, SPEC)
    assert_unchanged(model, before)


def test_bitsandbytes_is_not_imported_to_plan_a_float_model():
    source = __import__("inspect").getsource(provider)
    assert not [line for line in source.splitlines() if line.startswith("import bitsandbytes")]


# --- what is computed ---


@every_layer
def test_adapting_changes_no_bit(make):
    testing.assert_identity_at_init(quantised_llama(make), OFT(block_size=8), tokens())


@every_layer
def test_gradients_are_those_of_dequantising_and_rotating(make):
    base = quantised_llama(make).train()  # in evaluation, int8 rounds the activation as well
    adapted = oftfx.adapt(copy.deepcopy(base), SPEC)
    reference = oftfx.adapt(dequantised(base), SPEC)
    testing.assert_same_function(adapted, reference, tokens())


@pytest.mark.parametrize("block", [64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_block_size(block, quant_type):
    torch.manual_seed(0)
    wide = linear4bit(nn.Linear(block, 8), quant_type, block_size=block)
    model = nn.Sequential(wide, nn.Tanh(), nn.Linear(8, 8))
    assert wide.weight.quant_state.blocksize == block
    x = rows(torch.float32, block)
    spec = OFT(block_size=8, init_std=0.1, targets="0")
    adapted = oftfx.adapt(copy.deepcopy(model), spec, example_inputs=x)
    testing.assert_same_function(
        adapted, oftfx.adapt(dequantised(model), spec, example_inputs=x), x
    )
    expected = adapted(x)
    kept = oftfx.merge(copy.deepcopy(adapted), requantize=True)
    assert kept[0].weight.quant_state.blocksize == block
    testing.assert_close(oftfx.merge(adapted, dtype=torch.float32)(x), expected, "output")


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_every_compute_dtype(compute, given):
    model = quantised(
        nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)),
        lambda linear: linear4bit(linear, compute=compute),
    )
    x = rows(given, 64)
    adapted = oftfx.adapt(copy.deepcopy(model), SPEC, example_inputs=x)
    reference = oftfx.adapt(dequantised(model).float(), SPEC, example_inputs=x.float())
    (got,), (expected,) = testing.run(adapted, x), testing.run(reference, x.float())
    assert got.dtype is given
    worst = max(testing.tolerance(compute), testing.tolerance(given))
    testing.assert_close(got.float(), expected, "output", worst)
    grads, references = testing.gradients(adapted, x), testing.gradients(reference, x.float())
    for name in oftfx.testing.thetas(adapted):
        testing.assert_close(grads[name], references[name], name, 2 * worst)


@both_widths
def test_training_changes_no_byte_of_the_base(make):
    model = quantised_llama(make)
    model(**tokens())  # int8 hands its statistics from the weight to the layer
    before = stored(model)
    oftfx.adapt(model, OFT(block_size=8))
    losses = train(model.train())
    with torch.no_grad():
        model.eval()(**tokens())
    losses += train(model.train())
    assert losses[-1] < losses[0]
    assert_unchanged(model, before)


# --- everywhere a model is put ---


@both_widths
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(make, reentrant):
    model = oftfx.adapt(quantised_llama(make), SPEC).train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
    testing.assert_same_function(twin, model, tokens())


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("make", "training"),
    [
        (linear4bit, True),
        pytest.param(linear4bit, False, marks=pytest.mark.slow),
        pytest.param(linear8bit, True, marks=pytest.mark.slow),
        pytest.param(linear8bit, False, marks=pytest.mark.slow),
    ],
)
def test_compiled_without_a_graph_break(make, training):
    model = oftfx.adapt(quantised_llama(make), SPEC).train(training)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    testing.assert_same_function(compiled, model, tokens())


@both_widths
def test_generates(make):
    model = oftfx.adapt(quantised_llama(make), SPEC)
    prompt = tokens(1, 4)["input_ids"]
    out = model.generate(prompt, max_new_tokens=4, do_sample=False)
    ids = prompt
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], -1)
    assert torch.equal(out, ids)


@both_widths
def test_disabled_and_removed_it_is_the_base(make):
    base = quantised_llama(make)
    classes = {name: type(module) for name, module in base.named_modules()}
    model = oftfx.adapt(copy.deepcopy(base), SPEC)
    expected = base(**tokens()).logits
    assert not torch.equal(model(**tokens()).logits, expected)
    with oftfx.disabled(model):
        assert torch.equal(model(**tokens()).logits, expected)
    oftfx.remove(model)
    assert torch.equal(model(**tokens()).logits, expected)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert stored(model).keys() == stored(base).keys()


@both_widths
def test_copied_and_pickled(make):
    model = oftfx.adapt(quantised_llama(make), SPEC)
    expected = model(**tokens()).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(**tokens()).logits, expected)
        assert not set(map(id, oftfx.parameters(twin))) & set(map(id, oftfx.parameters(model)))


@both_widths
def test_state_dict_round_trip(make):
    model = oftfx.adapt(quantised_llama(make), SPEC)
    expected = model(**tokens()).logits
    held = {key: value.clone() for key, value in model.state_dict().items()}
    testing.randomize(model, seed=3)
    rotations = {key: value for key, value in held.items() if ".oft." in key}
    missing = model.load_state_dict(rotations, strict=False)
    assert not missing.unexpected_keys
    assert torch.equal(model(**tokens()).logits, expected)


@both_widths
def test_saved_and_loaded(make, tmp_path):
    base = quantised_llama(make)
    model = oftfx.adapt(copy.deepcopy(base), SPEC)
    oftfx.save(model, tmp_path)
    loaded = oftfx.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(**tokens()).logits, model(**tokens()).logits)
    # on the float model that the base was made from, and the other way round
    floating = oftfx.load(float_llama(), tmp_path)
    oftfx.save(floating, tmp_path / "float")
    oftfx.load(copy.deepcopy(base), tmp_path / "float")
    other = float_llama()
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.2)
    with pytest.raises(oftfx.CheckpointError, match="the values of"):
        oftfx.load(other, tmp_path)


def test_on_a_quantised_base_that_was_merged_it_is_refused(tmp_path):
    """Two that are quantised alike agree but where rounding fell, also from another dtype."""
    spec = OFT(block_size=8, init_std=0.02)
    model = oftfx.adapt(quantised_llama(linear4bit), spec)
    oftfx.save(model, tmp_path)
    half = quantised(float_llama(torch.bfloat16), linear4bit)
    oftfx.load(half, tmp_path)
    merged = oftfx.merge(model, requantize=True)
    with pytest.raises(oftfx.CheckpointError, match="the values of"):
        oftfx.load(merged, tmp_path)


# --- folding ---


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_to_floats_it_computes_the_same(make, dtype):
    model = oftfx.adapt(quantised_llama(make), SPEC).train()
    reference = copy.deepcopy(model)
    merged, report = oftfx.merge(model, report=True, dtype=dtype)
    assert merged is model
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert {p.dtype for p in model.parameters()} == {dtype}
    got, expected = model(**tokens()).logits, reference(**tokens()).logits
    testing.assert_close(got.float(), expected, "logits", testing.tolerance(torch.float32))
    assert all(site.survived is None for site in report.sites)
    assert max(site.rounding_error for site in report.sites) < testing.tolerance(dtype)


def test_by_default_a_quantised_base_becomes_a_bfloat16_model():
    model = oftfx.adapt(quantised_llama(linear4bit), SPEC)
    reference = copy.deepcopy(model)
    oftfx.merge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    got, expected = model(**tokens()).logits, reference(**tokens()).logits
    testing.assert_close(got.float(), expected, "logits", testing.tolerance(torch.bfloat16))


def test_layers_that_were_not_adapted_become_floats_too():
    model = oftfx.adapt(quantised_llama(linear4bit), OFT(block_size=8, targets="q_proj"))
    oftfx.merge(model)
    assert not [m for m in model.modules() if sites.quantiser_of(m) is not None]


def test_where_only_float_layers_were_adapted_the_rest_stays_quantised():
    model = nn.Sequential(linear4bit(nn.Linear(64, 64)), nn.Linear(64, 64))
    x = rows(torch.float32, 64)
    oftfx.adapt(model, OFT(block_size=8, init_std=0.1, targets="1"), example_inputs=x)
    expected = model(x)
    oftfx.merge(model)
    assert isinstance(model[0], bnb.nn.Linear4bit)
    torch.testing.assert_close(model(x), expected)


def test_biases_and_hooks_stay():
    model = nn.Sequential(linear4bit(nn.Linear(64, 32)))
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    x = rows(torch.float32, 64)
    oftfx.adapt(model, SPEC, example_inputs=x)
    expected = model(x)
    layer = model[0]
    oftfx.merge(model, dtype=torch.float32)
    assert model[0] is layer
    assert model[0].bias is not None
    torch.testing.assert_close(model(x), expected)
    assert len(seen) == 2


def test_one_layers_floats_at_a_time(monkeypatch):
    """Each layer's float32 weight is gone before the next one's is made."""
    import weakref

    alive: list[weakref.ref] = []
    real = provider.Linear4bit.dequantise

    def watched(self, module):
        assert not [ref for ref in alive if ref() is not None]
        weight = real(self, module)
        alive.append(weakref.ref(weight))
        return weight

    model = oftfx.adapt(quantised_llama(linear4bit), SPEC)
    monkeypatch.setattr(provider.Linear4bit, "dequantise", watched)
    oftfx.merge(model, report=True)
    assert len(alive) >= 14


@every_layer
def test_requantised_it_keeps_its_format_and_says_what_survived(make):
    model = oftfx.adapt(quantised_llama(make), OFT(block_size=8, init_std=0.1)).train()
    reference = copy.deepcopy(model)
    shapes = shapes_of(model)
    _, report = oftfx.merge(model, report=True, requantize=True)
    assert shapes_of(model) == shapes
    assert {type(m) for m in model.modules() if sites.quantiser_of(m)} <= {
        bnb.nn.Linear4bit,
        bnb.nn.Linear8bitLt,
    }
    folded = oftfx.merge(reference, dtype=torch.float32)
    assert_rounded(report, model, folded, dequantised(quantised_llama(make)), make)
    for site in report.sites:
        layer, exact = (m.get_submodule(site.fqn) for m in (model, folded))
        off = (floats(layer) - exact.weight).abs()
        assert (off <= most_rounding(layer, exact.weight) * (1 + 1e-5)).all(), site
    assert "survived" in str(report)


@every_layer
def test_a_merge_that_is_stopped_turns_no_weight_twice(make, monkeypatch):
    model = oftfx.adapt(quantised_llama(make), OFT(block_size=8, init_std=0.1)).train()
    straight = oftfx.merge(copy.deepcopy(model), requantize=True)
    seen = []
    kind = next(q for q in map(sites.quantiser_of, model.modules()) if q is not None)

    with monkeypatch.context() as stopping:
        requantise = kind.requantise

        def stopped(module, weight):
            seen.append(module)
            if len(seen) > 2:
                raise torch.OutOfMemoryError
            requantise(module, weight)

        stopping.setattr(kind, "requantise", stopped)
        with pytest.raises(torch.OutOfMemoryError):
            oftfx.merge(model, requantize=True)
    oftfx.merge(model, requantize=True)
    given = tokens()
    assert torch.equal(model(**given).logits, straight(**given).logits)


def test_what_survived_is_what_the_definition_says():
    layer = nn.Sequential(linear4bit(nn.Linear(64, 32, bias=False)))
    before = provider.LINEAR4BIT.dequantise(layer[0]).double()
    oftfx.adapt(layer, OFT(block_size=8, init_std=0.03), example_inputs=rows(torch.float32, 64))
    folded = oftfx.merge(copy.deepcopy(layer), dtype=torch.float64)[0].weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OftfxWarning)
        _, report = oftfx.merge(layer, report=True, requantize=True)
    after = provider.LINEAR4BIT.dequantise(layer[0]).double()
    change = folded - before
    expected = float(((after - before) * change).sum() / change.square().sum())
    assert report.sites[0].survived == pytest.approx(expected, rel=1e-4)
    error = float((after - folded).norm() / folded.norm())
    assert report.sites[0].rounding_error == pytest.approx(error, rel=1e-4)


def test_a_small_rotation_is_rounded_away_loudly():
    model = oftfx.adapt(quantised_llama(linear4bit), OFT(block_size=8, init_std=1e-3))
    with pytest.warns(OftfxWarning, match=r"rounded most of the adaptation away at 14 of 14"):
        _, report = oftfx.merge(model, report=True, requantize=True)
    assert max(site.survived for site in report.sites) < 0.5


def test_options_that_do_not_fit_are_refused():
    floating = oftfx.adapt(float_llama(), SPEC)
    for options in ({"dtype": torch.bfloat16}, {"requantize": True}):
        with pytest.raises(MergeError, match="quantised layers, and the model has none"):
            oftfx.merge(floating, **options)
    model = oftfx.adapt(quantised_llama(linear4bit), SPEC)
    with pytest.raises(MergeError, match="leave dtype out"):
        oftfx.merge(model, dtype=torch.bfloat16, requantize=True)
    with pytest.raises(MergeError, match="floating dtype"):
        oftfx.merge(model, dtype=torch.int8)
    assert oftfx.parameters(model)


def test_a_damaged_quant_state_is_found_before_anything_changes():
    model = oftfx.adapt(quantised_llama(linear4bit), SPEC)
    last = model.model.layers[1].mlp.down_proj
    last.weight.quant_state.state2.absmax.fill_(float("nan"))
    with pytest.raises(MergeError, match=r"layers\.1\.mlp\.down_proj.*not finite"):
        oftfx.merge(model)
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    assert oftfx.parameters(model)


# --- quant states that are not what they should be ---


def test_a_layer_that_was_never_quantised_is_refused_by_name():
    x = rows(torch.float32, 64)
    for layer in (
        bnb.nn.Linear4bit(64, 32),
        bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
    ):
        model = nn.Sequential(layer, nn.Linear(32, 32))
        for spec in (OFT(block_size=8), OFT(block_size=8, targets="0")):
            with pytest.raises(PlanError, match=r"0: it is not quantised yet.*\.to\(device\)"):
                oftfx.adapt(model, spec, example_inputs=x)
    model = nn.Sequential(bnb.nn.Linear8bitLt(64, 32))
    with pytest.raises(PlanError, match="has_fp16_weights=False"):
        oftfx.adapt(model, OFT(block_size=8, targets="0"), example_inputs=x)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda w: setattr(w.quant_state, "shape", torch.Size([64, 32])), "quant state says"),
        (
            lambda w: setattr(w.quant_state, "absmax", w.quant_state.absmax[1:]),
            "scales 31 blocks, the weight has 32",
        ),
        (lambda w: setattr(w, "data", w.data[:-1]), "holds 2046 numbers, not 32×64"),
    ],
)
def test_a_corrupted_quant_state_is_refused_by_name(damage, told):
    model = nn.Sequential(linear4bit(nn.Linear(64, 32)))
    damage(model[0].weight)
    with pytest.raises(PlanError, match=f"0: .*{told}"):
        oftfx.adapt(model, OFT(block_size=8, targets="0"), example_inputs=rows(torch.float32, 64))


@pytest.mark.parametrize("name", ["CB", "SCB"])
def test_corrupted_int8_rows_are_refused_by_name(name):
    model = nn.Sequential(linear8bit(nn.Linear(64, 32)))
    weight = model[0].weight
    setattr(weight, name, getattr(weight, name)[1:])
    with pytest.raises(PlanError, match=r"0: it holds .* scales, the layer is \(32, 64\)"):
        oftfx.adapt(model, OFT(block_size=8, targets="0"), example_inputs=rows(torch.float32, 64))


# --- the layout that some CPUs use in evaluation ---


@pytest.mark.parametrize("double", [False, True])
def test_a_weight_repacked_for_inference_is_unpacked_before_training_and_folding(double):
    layer = linear4bit(nn.Linear(128, 64, bias=False), double=double)
    expected = provider.LINEAR4BIT.dequantise(layer)
    convert = bnb.functional._convert_weight_packed_for_cpu
    layer.weight.data, state = convert(layer.weight.data, layer.weight.quant_state)
    assert state.packing_format_for_cpu
    model = nn.Sequential(layer)
    oftfx.adapt(model, SPEC, example_inputs=rows(torch.float32, 128))
    assert not layer.weight.quant_state.packing_format_for_cpu
    found = provider.LINEAR4BIT.dequantise(layer)
    # its scales were rounded to bfloat16 on the way, and quantised again where they were before
    testing.assert_close(found, expected, "unpacked weight", 0.02)
    x = rows(torch.float32, 128)
    testing.gradients(model, x)
    rotated = model(x)
    testing.assert_close(oftfx.merge(model, dtype=torch.float32)(x), rotated, "merged")


def test_widths_that_this_cpu_misreads_are_told():
    """bitsandbytes 0.50 takes blocks to start anew in every row on a CPU; they do not."""
    weight = torch.tensor([1.0, 2.0, 4.0]).repeat_interleave(64).reshape(2, 96)
    data, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    misread = not torch.equal(bnb.functional.dequantize_4bit(data, state), weight)
    model = nn.Sequential(linear4bit(nn.Linear(96, 64)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        oftfx.adapt(model, SPEC, example_inputs=rows(torch.float32, 96))
    told = [str(w.message) for w in caught if w.category is OftfxWarning]
    assert [bool("96 is no multiple of their block size 64" in text) for text in told] == (
        [True] * misread
    )


def test_while_adapted_a_layer_is_not_repacked():
    """That layout rounds the scales and has no gradient."""
    layer = linear4bit(nn.Linear(64, 64))
    unadapted = linear4bit(nn.Linear(64, 64))
    model = nn.Sequential(layer, unadapted)
    for each in model:
        each.support_avx512bf16_for_cpu = True  # as on a CPU that has it
    x = rows(torch.float32, 64)
    oftfx.adapt(model, OFT(block_size=8, targets="0"), example_inputs=x)
    before = stored(model)
    with torch.no_grad():
        model.eval()(x)
    assert_unchanged(model, before)
    oftfx.remove(model)
    assert layer.support_avx512bf16_for_cpu == bnb.functional.has_avx512bf16()


@pytest.mark.parametrize("training", [True, False])
def test_a_base_that_is_exported_with_its_repacking_is_told_how_not_to(training):
    layer = linear4bit(nn.Linear(64, 64))
    layer.support_avx512bf16_for_cpu = True  # as on a CPU that has it
    model, x = nn.Sequential(layer).train(training), rows(torch.float32, 64)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=True)
    if training:
        assert len(oftfx.parameters(oftfx.adapt(program, OFT(block_size=8)))) == 1
        return
    with pytest.raises(oftfx.PlanError, match="export the model in training mode"):
        oftfx.adapt(program, OFT(block_size=8))


@pytest.mark.parametrize("out", [8, 64])
def test_what_follows_may_write_to_what_a_layer_in_4_bits_gives(out):
    """With a bias and three axes PyTorch's own result is a view."""
    layers = linear4bit(nn.Linear(64, out)), nn.ReLU(inplace=True)
    model = oftfx.adapt(nn.Sequential(*layers), SPEC, capture="modules").train()
    model(torch.randn(2, 96, 64)).sum().backward()
    assert all(parameter.grad.any() for parameter in oftfx.parameters(model))


def test_checkpoint_functions_see_the_rotation():
    layer = nn.Sequential(linear4bit(nn.Linear(64, 64)))
    x = rows(torch.float32, 64)
    oftfx.adapt(layer, SPEC, example_inputs=x)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in oftfx.parameters(layer))
