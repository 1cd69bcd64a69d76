"""Float layers that fold their weight in a training step instead of rotating their input."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import oftfx
from oftfx import OFT, testing
from oftfx.ops.cost import fold_from
from oftfx.sites import linear
from tests.small import llama, rows, tokens

SPEC = OFT(block_size=16, init_std=0.1)
CPU = torch.device("cpu")


@pytest.fixture
def folded(monkeypatch, choose) -> list[nn.Module]:
    """The layers that folded, in order; all do that can."""
    calls: list[nn.Module] = []
    real = linear.rotated_linear

    def counted(module, x: Tensor, core: Tensor, deferred: bool) -> Tensor:
        calls.append(module)
        return real(module, x, core, deferred)

    monkeypatch.setattr(linear, "rotated_linear", counted)
    choose("1")
    return calls


@pytest.fixture
def choose(monkeypatch) -> Iterator[Callable[[str], None]]:
    """Sets what the environment says."""

    def chosen(value: str) -> None:
        monkeypatch.setenv("OFTFX_FOLD", value)
        fold_from.cache_clear()

    yield chosen
    fold_from.cache_clear()


def layer(**options) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16, **options), nn.Tanh(), nn.Linear(16, 32, **options))
    return oftfx.adapt(model, SPEC, capture="modules")


def test_a_model_computes_what_it_does_otherwise(folded, choose):
    model = oftfx.adapt(llama(), SPEC).train()
    values = testing.run(model, tokens()), testing.gradients(model, tokens())
    assert len(folded) == 2 * 2 * 7
    choose("0")
    for got, expected in zip(values[0], testing.run(model, tokens()), strict=True):
        testing.assert_close(got, expected, "output")
    for name, expected in testing.gradients(model, tokens()).items():
        testing.assert_close(values[1][name], expected, name)
    assert len(folded) == 2 * 2 * 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_forward_is_that_of_the_merged_model_bit_for_bit(dtype, folded):
    model = oftfx.adapt(llama(dtype), SPEC).train()
    got = model(**tokens()).logits
    assert folded
    assert torch.equal(got, oftfx.merge(model)(**tokens()).logits)


def test_at_first_it_gives_the_bits_of_its_base(folded):
    testing.assert_identity_at_init(llama(), OFT(block_size=16), tokens())
    model = oftfx.adapt(base := llama(), OFT(block_size=16)).train()
    got = model(**tokens()).logits
    assert folded
    with oftfx.disabled(model):
        assert torch.equal(got, base(**tokens()).logits)


def test_gradients_accumulate(folded):
    """Two forwards before the first backward: what each was folded to is its own."""
    model, x = layer(), rows(torch.float32, 32)
    first, second = model(x), model(2 * x)
    (first.sin().sum() + second.sin().sum()).backward()
    grads = [parameter.grad.clone() for parameter in oftfx.parameters(model)]
    model.zero_grad()
    for each in (x, 2 * x):
        model(each).sin().sum().backward()
    for parameter, grad in zip(oftfx.parameters(model), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant, folded):
    model = oftfx.adapt(llama(), SPEC).train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
    testing.assert_same_function(twin, model, tokens())
    assert folded


def test_what_follows_may_write_to_what_it_gives(folded):
    """With a bias and three axes PyTorch's own result is a view."""
    layers = nn.Linear(64, 64), nn.ReLU(inplace=True)
    model = oftfx.adapt(nn.Sequential(*layers), SPEC, capture="modules").train()
    model(torch.randn(2, 96, 64)).sum().backward()
    assert folded
    assert all(parameter.grad.any() for parameter in oftfx.parameters(model))


def test_under_autocast(folded):
    model = oftfx.adapt(llama(), SPEC).train()
    with torch.autocast("cpu", torch.bfloat16):
        got = model(**tokens()).logits
        assert folded
        assert torch.equal(got, oftfx.merge(copy.deepcopy(model))(**tokens()).logits)


def test_without_a_gradient_x_is_rotated(folded):
    model = layer()
    with torch.no_grad():
        model(rows(torch.float32, 32))
    assert not folded


def test_what_cannot_be_folded_is_rotated(folded):
    """A weight that is trained; a rotation that others share."""
    trained, x = layer(), rows(torch.float32, 32)
    for parameter in trained.parameters():
        parameter.requires_grad_(True)
    trained(x).sum().backward()
    assert trained[0].weight.grad is not None
    shared = oftfx.adapt(llama(), OFT(block_size=16, share_inputs=True)).train()
    shared(**tokens())
    outer = [module for module in folded if module.in_features == 64]
    assert len(outer) == 2  # o_proj alone: q, k, v and gate, up share theirs


def test_layers_that_read_one_tensor_fold_together_or_not_at_all(choose):
    """For together they rotate in one op."""
    fit = fold_from((1024, 256, 256), 32, torch.float32, CPU)
    if fit is None:
        pytest.skip("no C compiler")
    assert fit == fold_from((512,), 32, torch.float32, CPU)
    assert fold_from((256,), 32, torch.float32, CPU) < fit
    assert fold_from((), 32, torch.float32, CPU) is None
    assert fold_from((512,), 20, torch.float32, CPU) is None
    assert fold_from((512,), 32, torch.bfloat16, CPU) is None
    assert fold_from((512,), 32, torch.float32, torch.device("cuda")) is None
    choose("0")
    assert fold_from((512,), 32, torch.float32, CPU) is None


def test_behind_a_norm_or_a_product_they_rotate_and_go_on_through_it(folded, choose):
    choose("")
    if fold_from((64,), 16, torch.float32, CPU) is None:
        pytest.skip("no C compiler")
    model = oftfx.adapt(llama(), SPEC).train()
    model(**tokens(8, 32))
    names = {module: name.partition("layers.")[2] for name, module in model.named_modules()}
    # The first norm's gradient is not wanted, and what attention gives is no norm's.
    first = ["0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"]
    assert [names[module] for module in folded] == [
        *first,
        "0.self_attn.o_proj",
        "1.self_attn.o_proj",
    ]


def test_from_so_many_rows_on(monkeypatch):
    model = layer()
    least = fold_from((16,), 16, torch.float32, CPU)
    if least is None:
        pytest.skip("no C compiler")
    seen: list[int] = []
    real = linear.folded_linear
    monkeypatch.setattr(linear, "folded_linear", lambda x, *a: seen.append(len(x)) or real(x, *a))
    for count in (least - 1, least):
        model[0](torch.randn(count, 32))
    assert seen == [least]
