"""An adapted model is an ordinary model: everywhere a user would put one, it computes the same."""

import contextlib
import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.export import Dim, export

import oftfx
from oftfx import OFT, testing
from oftfx.backend import oftfx as backend
from tests.small import VOCABULARY, Attention, llama, rows, tokens

SPEC = OFT(block_size=8, init_std=0.1)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def adapted():
    return oftfx.adapt(llama(), SPEC)


def compiled(model: nn.Module, **options) -> nn.Module:
    return torch.compile(copy.deepcopy(model), **{"backend": "aot_eager", **options})


def thetas_of(model: nn.Module) -> list[torch.Tensor]:
    return [value for _, value in sorted(testing.thetas(model).items())]


def train_step(model: nn.Module, inputs) -> float:
    optimizer = torch.optim.SGD(oftfx.parameters(model), lr=0.1)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


# torch.compile


@pytest.mark.parametrize("compiler", ["inductor", backend], ids=["inductor", "oftfx"])
def test_compiled_by_inductor(compiler):
    x = rows(torch.float32)
    model = oftfx.adapt(Attention(), OFT(block_size=4, init_std=0.2), example_inputs=x)
    testing.assert_same_function(compiled(model, backend=compiler), model, x)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["inductor", backend], ids=["inductor", "oftfx"])
def test_a_language_model_compiled_by_inductor(compiler, adapted):
    testing.assert_same_function(compiled(adapted, backend=compiler), adapted, tokens())


def test_compiled_without_a_graph_break(adapted):
    testing.assert_same_function(compiled(adapted, fullgraph=True), adapted, tokens())


@pytest.mark.parametrize("share_inputs", [False, True])
def test_compiled_layer_by_layer_every_layer_keeps_its_own_rotation(share_inputs):
    model = oftfx.adapt(llama(layers=3), OFT(block_size=8, init_std=0.1, share_inputs=share_inputs))
    twin = copy.deepcopy(model)
    for layer in twin.model.layers:
        layer.compile(backend="aot_eager")
    testing.assert_same_function(twin, model, tokens())
    assert len({theta.data_ptr() for theta in thetas_of(twin)}) == len(thetas_of(model))
    # and one compiled graph serves all layers
    assert counters["stats"]["unique_graphs"] <= 2 + 2  # with and without gradients


def test_compiled_layer_by_layer_training_moves_every_layer_as_eager_does(adapted):
    twin = copy.deepcopy(adapted)
    for layer in twin.model.layers:
        layer.compile(backend="aot_eager")
    for _ in range(2):
        assert train_step(twin, tokens()) == pytest.approx(train_step(adapted, tokens()), rel=1e-5)
    for a, b in zip(thetas_of(twin), thetas_of(adapted), strict=True):
        testing.assert_close(a.detach(), b.detach(), "theta")
    values = torch.stack([m.self_attn.q_proj.oft.default.theta for m in twin.model.layers])
    assert not torch.equal(values[0], values[1])


def test_recompiled_for_new_shapes_the_rotations_stay():
    spec = OFT(block_size=4, init_std=0.2)
    model = oftfx.adapt(Attention(), spec, example_inputs=rows(torch.float32))
    twin = compiled(model)
    for batch, length in [(2, 3), (3, 7), (4, 5)]:
        x = torch.randn(batch, length, 8)
        testing.assert_same_function(twin, model, x)
        for trained in (twin, model):
            trained(x).square().mean().backward()
            torch.optim.SGD(oftfx.parameters(trained), lr=0.1).step()
            trained.zero_grad()
    assert counters["stats"]["unique_graphs"] >= 2
    testing.assert_same_function(twin, model, torch.randn(5, 2, 8))


def test_recompiled_when_its_adapter_changes():
    model = oftfx.adapt(
        Attention(), OFT(block_size=4, init_std=0.2), example_inputs=rows(torch.float32)
    )
    x = rows(torch.float32)
    program = torch.compile(model, backend="aot_eager")
    testing.assert_same_function(program, model, x)
    oftfx.remove(model)
    testing.assert_same_function(program, model, x)
    oftfx.adapt(model, OFT(block_size=2, order=3, init_std=0.2), example_inputs=x)
    expected = testing.run(copy.deepcopy(model), x)
    testing.assert_close(testing.run(program, x)[0], expected[0], "the new spec's output")


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Attention()
        self.second = Attention()

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def test_compiled_around_a_graph_break():
    x = rows()
    model = oftfx.adapt(Broken().double(), OFT(block_size=4, init_std=0.2), example_inputs=x)
    assert {site.fqn for site in oftfx.plan(Broken().double(), OFT(block_size=4), x).sites} == {
        f"{half}.{name}" for half in ("first", "second") for name in ("q", "k", "v", "out")
    }
    testing.assert_same_function(compiled(model), model, x)
    assert counters["graph_break"]


def test_adapting_after_compiling_takes_effect():
    model = llama(layers=1)
    program = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        before = program(**tokens()).logits
    assert oftfx.adapt(program, SPEC) is program
    with torch.no_grad():
        after = program(**tokens()).logits
    assert not torch.allclose(before, after, atol=1e-3)
    testing.assert_same_function(program, copy.deepcopy(model), tokens())
    oftfx.remove(program)
    with torch.no_grad():
        assert torch.equal(program(**tokens()).logits, before)


def test_disabled_reaches_into_a_compiled_model():
    base = Attention()
    model = oftfx.adapt(
        copy.deepcopy(base), OFT(block_size=4, init_std=0.2), example_inputs=rows(torch.float32)
    )
    program = torch.compile(model, backend="aot_eager")
    x = rows(torch.float32)
    with torch.no_grad():
        outside = program(x)
        with oftfx.disabled(program):
            testing.assert_close(program(x), base(x), "the base's output")
        assert torch.equal(program(x), outside)


def test_adapting_a_part_of_a_larger_model():
    whole = Broken().double()
    oftfx.adapt(whole.second, OFT(block_size=4, init_std=0.2), example_inputs=rows())
    assert whole.first.q.weight.requires_grad
    assert not whole.second.q.weight.requires_grad
    testing.assert_same_function(compiled(whole), whole, rows())
    testing.assert_folds(whole.second, rows())


# torch.export


def saved_and_loaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("share_inputs", [False, True], ids=["each", "shared"])
def test_exported(strict, share_inputs):
    x = rows()
    model = Attention().double()
    oftfx.adapt(model, OFT(block_size=4, init_std=0.2, share_inputs=share_inputs), example_inputs=x)
    shapes = {"x": {0: Dim("batch"), 1: Dim("length")}}
    program = export(model, (x,), dynamic_shapes=shapes, strict=strict)
    testing.assert_same_function(program, model, x)
    testing.assert_same_function(program, model, torch.randn(5, 7, 8, dtype=torch.float64))
    loaded = saved_and_loaded(program)
    testing.assert_same_function(loaded, model, x)
    testing.assert_folds(loaded, x)


@pytest.mark.parametrize(
    "strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["non-strict", "strict"]
)
def test_a_language_model_exported_saved_loaded_trained_and_merged(strict):
    model = oftfx.adapt(llama(), SPEC)
    ids = tokens()["input_ids"]
    shapes = {"input_ids": {0: Dim("batch"), 1: Dim("length", max=128)}, "use_cache": None}
    program = saved_and_loaded(export(model, (), tokens(), dynamic_shapes=shapes, strict=strict))
    testing.assert_same_function(program, model, tokens(3, 8))

    runnable = program.module()
    optimizer = torch.optim.SGD([p for p in runnable.parameters() if p.requires_grad], lr=0.1)
    logits = runnable(**tokens()).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    train_step(model, tokens())
    with torch.no_grad():
        trained = runnable(**tokens(3, 8)).logits
        testing.assert_close(trained, model(**tokens(3, 8)).logits, "after a step", within=1e-4)
    testing.assert_folds(program, tokens())


def test_a_base_exported_then_adapted_is_the_adapted_model_exported(adapted):
    program = oftfx.adapt(export(llama(), (), tokens()), SPEC)
    testing.assert_same_function(program, adapted, tokens())
    testing.assert_same_function(saved_and_loaded(program), adapted, tokens())


# training


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("share_inputs", [False, True], ids=["each", "shared"])
def test_gradient_checkpointing(reentrant, share_inputs):
    model = oftfx.adapt(llama(), OFT(block_size=8, init_std=0.1, share_inputs=share_inputs)).train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:  # its regions need an input with a gradient, as for any adapter
        twin.enable_input_require_grads()
    testing.assert_same_function(twin, model, tokens())
    testing.assert_same_function(twin, model, tokens())  # nothing was left over


@pytest.mark.slow
def test_gradient_checkpointing_compiled():
    adapted = oftfx.adapt(llama(layers=1), SPEC)
    twin = copy.deepcopy(adapted).train()
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    testing.assert_same_function(torch.compile(twin, backend="aot_eager"), adapted, tokens())


@pytest.mark.parametrize("share_inputs", [False, True], ids=["each", "shared"])
def test_autocast(share_inputs):
    base = llama(layers=1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain = base(**tokens()).logits
        model = oftfx.adapt(base, OFT(block_size=8, share_inputs=share_inputs))
        assert torch.equal(model(**tokens()).logits, plain)
    testing.randomize(model, std=0.1)
    exact = testing.gradients(model, tokens())
    with torch.autocast("cpu", torch.bfloat16):
        rough = testing.gradients(model, tokens())
        testing.assert_same_function(compiled(model), model, tokens(), within=0.1)
    assert {grad.dtype for grad in rough.values()} == {torch.float32}
    for name in exact:
        testing.assert_close(rough[name], exact[name], name, within=0.3)


def test_trainer(adapted, tmp_path):
    from transformers import Trainer, TrainingArguments

    base = {name: value.clone() for name, value in adapted.state_dict().items()}
    examples = [{"input_ids": row, "labels": row} for row in tokens(4, 12)["input_ids"]]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(adapted, arguments, train_dataset=examples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    for name, value in adapted.state_dict().items():
        assert torch.equal(value, base[name]) == (".oft." not in name), name


def test_mixed_with_other_trainable_parameters(adapted):
    adapted.model.norm.weight.requires_grad_(True)
    twin = copy.deepcopy(adapted)
    for model in (adapted, torch.compile(twin, backend="aot_eager")):
        model(**tokens(), labels=tokens()["input_ids"]).loss.backward()
    grad = adapted.model.norm.weight.grad
    testing.assert_close(twin.model.norm.weight.grad, grad, "the norm's gradient")


# generation


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("share_inputs", [False, True], ids=["each", "shared"])
def test_generate_is_the_merged_models(cache, share_inputs):
    model = oftfx.adapt(
        llama(torch.float64),
        OFT(block_size=8, init_std=0.1, share_inputs=share_inputs, dtype=torch.float64),
    )
    prompt = tokens(2, 5)["input_ids"]
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "cache_implementation": cache,
        "attention_mask": torch.ones_like(prompt),
        "disable_compile": True,
    }
    said = model.generate(prompt, **options)
    assert not torch.equal(said, llama(torch.float64).generate(prompt, **options))
    assert torch.equal(said, oftfx.merge(model).generate(prompt, **options))


# moving and copying


def test_deepcopy_is_independent(adapted):
    twin = copy.deepcopy(adapted)
    testing.assert_same_function(twin, adapted, tokens(), within=0)
    before = adapted(**tokens()).logits.detach()
    testing.randomize(twin, seed=7)
    assert torch.equal(adapted(**tokens()).logits, before)
    assert not torch.equal(twin(**tokens()).logits, before)


def test_deepcopy_of_shared_rotations_shares_among_the_copies():
    model = oftfx.adapt(llama(), OFT(block_size=8, init_std=0.1, share_inputs=True))
    twin = copy.deepcopy(model)
    attention = twin.model.layers[0].self_attn
    assert attention.k_proj.oft.default.rotation is attention.q_proj.oft.default
    assert attention.q_proj.oft.default is not model.model.layers[0].self_attn.q_proj.oft.default
    testing.randomize(twin, seed=7)
    with torch.no_grad():
        expected = twin(**tokens()).logits
    testing.assert_close(oftfx.merge(twin)(**tokens()).logits.detach(), expected, "merged")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_another_dtype(adapted, dtype):
    with torch.no_grad():
        adapted(**tokens())  # builds the cores in the old dtype
        moved = adapted.to(dtype)(**tokens()).logits
        fresh = oftfx.adapt(llama(), SPEC).to(dtype)(**tokens()).logits
    assert moved.dtype == dtype
    assert torch.equal(moved, fresh)


def test_to_meta_and_back(adapted):
    state = copy.deepcopy(adapted.state_dict())
    with torch.no_grad():
        expected = adapted(**tokens()).logits
        adapted.to("meta")
        assert {theta.device.type for theta in thetas_of(adapted)} == {"meta"}
        meta = adapted.model.layers[0](
            torch.empty(1, 4, 64, device="meta"),
            position_embeddings=(torch.empty(1, 4, 16, device="meta"),) * 2,
        )
        assert meta.shape == (1, 4, 64)
        fresh = oftfx.adapt(llama(), SPEC)
        fresh.load_state_dict(state, assign=True)
        assert torch.equal(fresh(**tokens()).logits, expected)


def test_state_dict_into_a_freshly_adapted_model(adapted):
    fresh = oftfx.adapt(llama(), OFT(block_size=8))
    with torch.no_grad():
        fresh(**tokens())  # builds cores that the loaded values must replace
        assert fresh.load_state_dict(adapted.state_dict()).missing_keys == []
        assert torch.equal(fresh(**tokens()).logits, adapted(**tokens()).logits)


@pytest.mark.parametrize("share_inputs", [False, True], ids=["each", "shared"])
def test_functional_call_takes_other_values(share_inputs):
    x = rows()
    spec = OFT(block_size=4, init_std=0.2, share_inputs=share_inputs, dtype=torch.float64)
    model = oftfx.adapt(Attention().double(), spec, example_inputs=x)
    for seed in range(4):
        twin = testing.randomize(copy.deepcopy(model), seed)
        for grad in (torch.no_grad(), torch.enable_grad()):
            with grad:
                # The tensors die between the rounds, and new ones may take their addresses.
                values = {n: t.detach().clone() for n, t in testing.thetas(twin).items()}
                called = torch.func.functional_call(model, values, (x,))
                assert torch.equal(called, twin(x))
                del values


def test_vmap_over_inputs_and_over_adapters():
    x = rows()
    spec = OFT(block_size=4, init_std=0.2, dtype=torch.float64)
    model = oftfx.adapt(Attention().double(), spec, example_inputs=x)
    with torch.no_grad():
        batched = torch.vmap(model)(x)
        testing.assert_close(batched, torch.stack([model(row) for row in x]), "over inputs")
        named = {n: torch.stack([t, -t]).detach() for n, t in testing.thetas(model).items()}
        both = torch.vmap(lambda values: torch.func.functional_call(model, values, (x,)))(named)
        for i in range(2):
            one = {name: values[i] for name, values in named.items()}
            testing.assert_close(both[i], torch.func.functional_call(model, one, (x,)), f"{i}")


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_vmap():
    """Dynamo runs a transform between two graphs, where it compiles what Python it meets."""
    x = rows()
    spec = OFT(block_size=4, init_std=0.2, dtype=torch.float64)
    model = oftfx.adapt(Attention().double(), spec, example_inputs=x)
    found = []
    for run in (torch.compile(torch.vmap(model), backend="aot_eager"), torch.vmap(model)):
        out = run(x)
        found.append((out.detach(), torch.autograd.grad(out.sin().sum(), thetas_of(model))))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_share_inputs_in_every_grad_mode(mode):
    x = rows()
    spec = OFT(block_size=4, init_std=0.2, share_inputs=True)
    model = oftfx.adapt(Attention().double(), spec, example_inputs=x)
    expected = oftfx.merge(copy.deepcopy(model))(x).detach()
    with mode():
        testing.assert_close(model(x).detach(), expected, str(mode), within=1e-6)
    model(x).sum().backward()
    assert all(theta.grad is not None for theta in thetas_of(model))


def test_vocabulary_is_never_touched(adapted):
    """The head is left out by default, so a tied embedding stays what it was."""
    assert adapted.get_input_embeddings().weight.shape[0] == VOCABULARY
    assert adapted.lm_head.weight is adapted.model.embed_tokens.weight
    assert type(adapted.lm_head) is nn.Linear
