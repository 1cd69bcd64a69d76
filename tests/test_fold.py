"""Merging keeps the function, restores the plain model, and says what it cost."""

import copy
import warnings
import weakref
from collections import Counter

import pytest
import torch
from torch import fx, nn
from torch.export import export
from torch.utils._python_dispatch import TorchDispatchMode

import oftfx
from oftfx import OFT, MergeError, testing
from oftfx.fold.weight import Fold
from oftfx.modules import Adapted
from tests.small import SMALL, Attention, Functional, Tied, TwiceUsed, llama, rows, small, tokens

SPEC = OFT(block_size=4, init_std=0.2, dtype=torch.float64)
KINDS = ("module", "graph", "program")


def adapted(kind: str, name: str, dtype: torch.dtype = torch.float64, spec: OFT = SPEC):
    """The same model, adapted as each of the three kinds, and its input."""
    x = rows(dtype)
    return adapt_as(kind, small(name, dtype), spec, x), x


def adapt_as(kind: str, model: nn.Module, spec: OFT, x, name: str = "default"):
    if kind == "module":
        return oftfx.adapt(model, spec, name, example_inputs=x)
    if kind == "graph":
        return oftfx.adapt(fx.symbolic_trace(model), spec, name)
    return oftfx.adapt(export(model, (x,)), spec, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merged_is_unmerged(kind, name, dtype):
    model, x = adapted(kind, name, dtype)
    testing.assert_folds(model, x)


@pytest.mark.parametrize("kind", KINDS)
def test_one_rotation_for_several_weights(kind):
    spec = OFT(block_size=4, init_std=0.2, dtype=torch.float64, share_inputs=True)
    model, x = adapted(kind, "attention", spec=spec)
    assert len(oftfx.parameters(model)) == 2
    testing.assert_folds(model, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "attention", "functional", "conv1d", "twice used", "tied"])
def test_two_adapters_fold_in_reverse(kind, name):
    model, x = adapted(kind, name)
    second = OFT(block_size=2, exact=True, init_std=0.3, seed=1, dtype=torch.float64)
    base = small(name)
    model = oftfx.adapt(model, second, "second", example_inputs=x if kind == "module" else None)
    assert len(oftfx.parameters(model)) == 2 * len(oftfx.parameters(model, "second"))
    # x·R1·R2 really does not commute here
    other = adapt_as(kind, base, second, x, "second")
    other = oftfx.adapt(other, SPEC, example_inputs=x if kind == "module" else None)
    assert not torch.allclose(testing.run(model, x)[0], testing.run(other, x)[0], atol=1e-4)
    testing.assert_folds(model, x)


@pytest.mark.parametrize("kind", ["graph", "program"])
@pytest.mark.parametrize("name", SMALL)
def test_an_adapted_module_traced_and_then_merged(kind, name):
    model, x = adapted("module", name)
    traced = export(model, (x,)) if kind == "program" else export(model, (x,)).module()
    testing.assert_same_function(traced, model, x)
    if (kind, name) == ("graph", "tied"):  # one node reads both, and nothing tells them apart
        with pytest.raises(MergeError, match="weight is read rotated in different ways"):
            oftfx.merge(traced)
        return
    testing.assert_folds(traced, x)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_a_tied_head_in_a_program_gets_a_weight_of_its_own(strict):
    program = export(tied_llama(), (), tokens(), strict=strict)
    testing.assert_folds(program, tokens())
    merged = oftfx.merge(program).state_dict
    embedding = llama(torch.float64).state_dict()["model.embed_tokens.weight"]
    assert torch.equal(merged["model.embed_tokens.weight"], embedding)
    assert not torch.equal(merged["lm_head.weight"], embedding)


def test_a_rotation_that_something_else_reads_is_refused_by_name():
    graph = oftfx.adapt(fx.symbolic_trace(small("mlp")), SPEC)
    rotation = next(n for n in graph.graph.nodes if "oftfx.rotate" in str(n.target))
    with graph.graph.inserting_before(next(iter(graph.graph.find_nodes(op="output")))):
        total = graph.graph.call_method("sum", (rotation,))
    output = graph.graph.output_node()
    output.args = ((output.args[0], total),)
    graph.recompile()
    before = graph.code
    with pytest.raises(MergeError, match=r"0: .* reads what it rotates"):
        oftfx.merge(graph)
    assert graph.code == before


@pytest.mark.parametrize("share_inputs", [False, True])
def test_a_language_model(share_inputs):
    model = oftfx.adapt(
        llama(torch.float64),
        OFT(block_size=8, init_std=0.1, share_inputs=share_inputs, dtype=torch.float64),
    )
    testing.assert_folds(model, tokens())


def test_the_module_is_plain_again():
    base = small("functional")
    classes = {name: type(module) for name, module in base.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    keys = list(base.state_dict())
    model = oftfx.adapt(base, SPEC, example_inputs=rows())
    assert oftfx.merge(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert list(model.state_dict()) == keys
    assert not any("oft" in key for module in model.modules() for key in vars(module))
    with pytest.raises(MergeError, match="nothing to merge"):
        oftfx.merge(model)


def test_the_graph_is_plain_again():
    base = fx.symbolic_trace(small("attention"))
    code, keys = base.code, list(base.state_dict())
    merged = oftfx.merge(oftfx.adapt(base, SPEC))
    assert merged is base
    assert merged.code == code
    assert list(merged.state_dict()) == keys
    assert not hasattr(merged.q, "oft")


def test_a_program_is_merged_into_another_and_stays_itself():
    program, x = adapted("program", "attention")
    before = testing.run(program, x)[0]
    merged = oftfx.merge(program)
    assert merged is not program
    assert torch.equal(testing.run(program, x)[0], before)
    assert not any("oftfx" in str(node.target) for node in merged.graph.nodes)
    assert set(merged.state_dict) == set(small("attention").state_dict())


# tied and doubly used weights


def tied_llama() -> nn.Module:
    spec = OFT(block_size=8, init_std=0.2, targets=["lm_head", "q_proj"], dtype=torch.float64)
    return oftfx.adapt(llama(torch.float64), spec)


def test_merging_a_tied_head_unties_it_and_leaves_the_embedding_alone():
    model = tied_llama()
    embedding = model.model.embed_tokens.weight.clone()
    with torch.no_grad():
        expected = model(**tokens()).logits
    model, report = oftfx.merge(model, report=True)
    testing.assert_close(model(**tokens()).logits.detach(), expected, "logits")
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, embedding)
    assert not model.config.tie_word_embeddings
    assert {site.fqn for site in report.sites if site.untied} == {"lm_head"}
    # what was trainable as one is trainable as two
    assert model.lm_head.weight.requires_grad
    assert model.model.embed_tokens.weight.requires_grad


def test_a_merged_model_with_an_untied_head_survives_saving(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tied_llama()
    with torch.no_grad():
        expected = model(**tokens()).logits
    oftfx.merge(model).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    testing.assert_close(again(**tokens()).logits.detach(), expected, "logits")


def test_two_tied_layers_get_a_weight_each():
    base = small("tied")
    weight = base.a.weight.detach().clone()
    model = oftfx.adapt(base, SPEC, example_inputs=rows())
    _, report = oftfx.merge(model, report=True)
    assert model.a.weight is not model.b.weight
    assert not torch.equal(model.a.weight, model.b.weight)
    for layer in (model.a, model.b):
        testing.assert_close(layer.weight @ layer.weight.T, weight @ weight.T, "Gram", within=1e-3)
    assert [site.untied for site in report.sites] == [True, False]  # the last keeps the tensor


def test_of_two_tied_layers_one_is_adapted():
    base = small("tied")
    weight = base.a.weight.detach().clone()
    spec = OFT(block_size=4, init_std=0.2, targets="b", dtype=torch.float64)
    model = oftfx.adapt(base, spec, example_inputs=rows())
    expected = testing.run(model, rows())[0]
    oftfx.merge(model)
    testing.assert_close(testing.run(model, rows())[0], expected, "output")
    assert torch.equal(model.a.weight, weight)


def program_of(model: nn.Module) -> nn.Module:
    return export(model, (rows(),)).module()


def sharing_storage(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        theirs.data = mine.data
    return other


@pytest.mark.parametrize("made", [program_of, sharing_storage])
@pytest.mark.parametrize("name", ["mlp", "functional"])
def test_whoever_else_reads_the_weights_reads_the_old_ones(made, name):
    model, x = adapted("module", name)
    other = made(model)
    expected = testing.run(other, x)[0]
    oftfx.merge(model)
    assert torch.equal(testing.run(other, x)[0], expected)
    testing.assert_close(testing.run(model, x)[0], expected, "output")


def test_a_head_outside_of_the_part_that_is_merged_stays_and_is_saved_as_it_is(tmp_path):
    from transformers import AutoModelForCausalLM

    model = llama(torch.float64)
    spec = OFT(block_size=8, init_std=0.2, targets="embed_tokens", dtype=torch.float64)
    oftfx.adapt(model.model, spec)
    with torch.no_grad():
        expected = model(**tokens()).logits
    oftfx.merge(model.model)
    testing.assert_close(model(**tokens()).logits.detach(), expected, "logits")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    testing.assert_close(again(**tokens()).logits.detach(), expected, "logits")


def test_a_model_in_a_wrapper_forgets_its_tie_as_well():
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    wrapper = Wrapper(tied_llama())
    oftfx.merge(wrapper)
    assert not wrapper.inner.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("name", "folded"), [("mlp", 1), ("attention", 1), ("attention", 3), ("functional", 1)]
)
def test_a_merge_that_is_stopped_leaves_a_model_that_computes_the_same(name, folded, monkeypatch):
    model, x = adapted("module", name)
    expected = testing.run(model, x)[0]
    run, seen = Fold.run, []

    def stopping(self):
        seen.append(self.fqn)
        if len(seen) > folded:
            raise KeyboardInterrupt
        return run(self)

    with monkeypatch.context() as stopped:
        stopped.setattr(Fold, "run", stopping)
        with pytest.raises(KeyboardInterrupt):
            oftfx.merge(model)
    testing.assert_close(testing.run(model, x)[0], expected, "output")
    oftfx.merge(model)
    testing.assert_close(testing.run(model, x)[0], expected, "output")
    assert not any(isinstance(module, Adapted) for module in model.modules())


def test_old_weights_go_as_they_are_folded(monkeypatch):
    model = oftfx.adapt(
        nn.Sequential(*(nn.Linear(8, 8).double() for _ in range(4))), SPEC, example_inputs=rows()
    )
    old, alive = [weakref.ref(layer.weight) for layer in model], []
    run = Fold.run

    def counting(self):
        alive.append(sum(weight() is not None for weight in old))
        return run(self)

    monkeypatch.setattr(Fold, "run", counting)
    oftfx.merge(model)
    assert alive == [4, 3, 2, 1]


def test_a_layer_under_two_names_is_folded_once():
    layer = nn.Linear(8, 8).double()
    model = oftfx.adapt(nn.Sequential(layer, nn.Tanh(), layer), SPEC, example_inputs=rows())
    expected = testing.run(model, rows())[0]
    _, report = oftfx.merge(model, report=True)
    assert [site.untied for site in report.sites] == [False]
    assert model[0] is model[2] is layer
    testing.assert_close(testing.run(model, rows())[0], expected, "output")


def test_a_weight_read_both_rotated_and_plain_is_refused_by_name():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8).double())

        def forward(self, x):
            return nn.functional.linear(x, self.w) + self.w.sum()

    graph = fx.symbolic_trace(Both())
    with pytest.raises(oftfx.PlanError, match="w: besides a matmul"):
        oftfx.adapt(graph, OFT(block_size=4, targets="w"))


# the report


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_in_float64_shows_no_loss(kind):
    model, _ = adapted(kind, "attention")
    _, report = oftfx.merge(model, report=True)
    assert {site.fqn for site in report.sites} == {"q", "k", "v", "out"}
    for site in report.sites:
        assert site.output_error < 1e-13
        assert site.rounding_error < 1e-13
        assert site.fqn in str(report)


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_in_bfloat16_shows_its_rounding(kind):
    model, _ = adapted(kind, "attention", torch.bfloat16)
    _, report = oftfx.merge(model, report=True)
    for site in report.sites:
        assert 2e-4 < site.rounding_error < 4e-3  # rounding to 8 bits: at most 2⁻⁹ an entry
        assert 2e-4 < site.output_error < 2e-2


@pytest.mark.parametrize(
    ("fields", "low", "high"),
    [({"exact": True}, 0, 1e-14), ({"order": 2}, 1e-6, 1), ({"order": 3}, 1e-4, 2)],
)
def test_the_reported_orthogonality_error_is_the_real_one(fields, low, high):
    spec = OFT(block_size=4, init_std=0.2, dtype=torch.float64, **fields)
    model, _ = adapted("module", "mlp", spec=spec)
    real = {}
    for fqn, rotation in oftfx.modules.rotations(model):
        r = rotation.cores()[0].detach() + torch.eye(4, dtype=torch.float64)
        defect = r.mT @ r - torch.eye(4, dtype=torch.float64)
        real[fqn] = float(torch.linalg.matrix_norm(defect, ord=2).max())
    _, report = oftfx.merge(model, report=True)
    for site in report.sites:
        assert site.orthogonality_error == pytest.approx(real[site.fqn], rel=1e-9, abs=1e-14)
        assert low <= site.orthogonality_error < high


# what folding leaves invariant


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_rotation_keeps_the_geometry_of_the_weight(kind):
    spec = OFT(block_size=4, exact=True, init_std=1.0, dtype=torch.float64)
    model, _ = adapted(kind, "mlp", spec=spec)
    before = small("mlp").state_dict()
    merged = oftfx.merge(model)
    after = merged.state_dict if kind == "program" else merged.state_dict()
    for name in ("0.weight", "2.weight"):
        old, new = before[name].detach(), after[name].detach()
        assert not torch.allclose(old, new, atol=1e-2)
        testing.assert_close(new.norm(dim=1), old.norm(dim=1), "row norms")
        testing.assert_close(new @ new.T, old @ old.T, "pairwise angles")
        testing.assert_close(torch.linalg.svdvals(new), torch.linalg.svdvals(old), "spectrum")
        for a, b in zip(new.split(4, 1), old.split(4, 1), strict=True):
            testing.assert_close(a @ a.T, b @ b.T, "Gram of a block")
        assert torch.equal(
            after[name.replace("weight", "bias")], before[name.replace("weight", "bias")]
        )


class Largest(TorchDispatchMode):
    """The most elements any tensor had that an op returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_no_matrix_of_the_size_in_by_in_is_ever_made(kind):
    width, out = 512, 8
    x = torch.randn(2, width)
    model = adapt_as(kind, nn.Sequential(nn.Linear(width, out)), OFT(init_std=0.1), x)
    with Largest() as largest:
        oftfx.merge(model, report=True)
    assert largest.numel <= width * 32  # the cores: width·block_size
    assert largest.numel < width * width / 10


@pytest.mark.gpu
@pytest.mark.parametrize("report", [False, True])
def test_a_gpu_is_waited_for_once_before_and_once_after(report):
    def merge_once():
        model = adapt_as("module", llama(torch.bfloat16).cuda(), OFT(block_size=4), None)
        testing.randomize(model)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                oftfx.merge(model, report=report)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [str(each.message) for each in caught if "synchroniz" in str(each.message)]

    merge_once()  # compiles the kernels
    assert len(merge_once()) <= 1 + report


class Named(TorchDispatchMode):
    """How often each op ran, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_all_rotations_are_looked_at_in_one_call(kind):
    model, _ = adapted(kind, "attention")
    with Named() as named:
        oftfx.merge(model)
    norms = {name: times for name, times in named.ran.items() if "norm" in name}
    assert norms == {"aten._foreach_norm.Scalar": 1}


def test_a_module_s_cores_are_built_together():
    model, _ = adapted("module", "attention")
    with Named() as named:
        oftfx.merge(model)
    cores = {name: times for name, times in named.ran.items() if "cayley" in name}
    assert sum(cores.values()) == 1, cores


# refusals


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
@pytest.mark.parametrize("parameter", ["theta", "magnitude"])
def test_a_rotation_that_is_not_finite_is_refused_by_name(kind, parameter, number):
    spec = OFT(block_size=4, init_std=0.2, dtype=torch.float64, magnitude=True)
    model, _x = adapted(kind, "attention", spec=spec)
    with torch.no_grad():
        testing.thetas(model)[f"v.oft.default.{parameter}"].view(-1)[0] = number
    state = model.state_dict if kind == "program" else model.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    with pytest.raises(MergeError, match="v: its rotation is not finite"):
        oftfx.merge(model)
    after = model.state_dict if kind == "program" else model.state_dict()
    assert list(after) == list(before)
    for name, value in after.items():
        assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)), name
    assert len(oftfx.parameters(model)) == 8


def test_weights_on_meta_are_refused_by_name():
    model, _ = adapted("module", "attention")
    model.to("meta")
    with pytest.raises(MergeError, match=r"q: its weight is on `meta`"):
        oftfx.merge(model)
    assert isinstance(model.q, Adapted)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_merge(kind):
    base = small("mlp")
    if kind != "module":
        base = fx.symbolic_trace(base) if kind == "graph" else export(base, (rows(),))
    for names in (None, ["default"], []):
        with pytest.raises(MergeError, match=f"nothing to merge: {type(base).__name__} has no"):
            oftfx.merge(base, names=names)


def test_a_model_is_merged_whose_parts_were_adapted():
    model = nn.Sequential(small("attention"), small("attention"))
    for part in model:
        oftfx.adapt(part, SPEC, example_inputs=rows())
    before = model(rows())
    testing.assert_close(oftfx.merge(model)(rows()), before, "output")
    assert not any(isinstance(module, Adapted) for module in model.modules())


def test_a_part_of_what_was_adapted_is_refused_untouched():
    model = nn.Sequential(small("attention"), small("attention"))
    oftfx.adapt(model, SPEC, example_inputs=rows())
    before = model(rows())
    with pytest.raises(MergeError, match="a part of a larger module than this"):
        oftfx.merge(model[0])
    assert torch.equal(model(rows()), before)


def test_a_compiled_model_is_merged_inside_its_wrapper():
    model, x = adapted("module", "mlp")
    program = torch.compile(model, backend="eager")
    expected = program(x).detach()
    assert oftfx.merge(program) is program
    assert not isinstance(model[0], Adapted)
    testing.assert_close(program(x).detach(), expected, "output")


def test_merging_a_copy_leaves_the_adapted_model_alone():
    model, x = adapted("module", "functional")
    before = testing.run(model, x)[0]
    oftfx.merge(copy.deepcopy(model))
    assert torch.equal(testing.run(model, x)[0], before)


def test_the_models_of_this_file_are_what_they_say():
    assert isinstance(small("functional"), Functional)
    assert isinstance(small("attention"), Attention)
    assert len(oftfx.plan(TwiceUsed(), OFT(block_size=4), rows(torch.float32)).sites) == 1
    assert all(s.tied for s in oftfx.plan(Tied(), OFT(block_size=4), rows(torch.float32)).sites)
