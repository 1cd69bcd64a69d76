"""A model whose layers are on several devices is adapted, trained and folded as on one."""

import copy

import pytest
import torch
from torch import nn

import oftfx
from oftfx import HRA, LOFT, OFT, PSOFT, testing
from tests.small import llama, tokens

DEVICES = ["cuda:0", "cuda:1"]
BATCH = {**tokens(), "labels": tokens()["input_ids"]}
SPECS = {
    "OFT": OFT(block_size=8),
    "OFT, shared inputs": OFT(block_size=8, share_inputs=True),
    "HRA": HRA(rank=4, weight=0.1),
    "PSOFT": PSOFT(rank=8),
    "PSOFT, full": PSOFT(rank=8, svd="full"),
    "LOFT": LOFT(rank=8),
}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def split() -> nn.Module:
    """The model with a layer on each device, inputs moved by accelerate."""
    from accelerate import dispatch_model

    first, second = DEVICES
    places = {"model.embed_tokens": first, "model.rotary_emb": first, "model.layers.0": first}
    places |= dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), second)
    return dispatch_model(llama(tied=False), places, main_device=first, force_hooks=True)


def adapted(model: nn.Module, spec: oftfx.Spec) -> nn.Module:
    calibration = [BATCH] if isinstance(spec, LOFT) else None
    return oftfx.adapt(model.train(), spec, calibration=calibration)


def learned(model: nn.Module) -> float:
    """The loss before a step of training."""
    parameters = oftfx.parameters(model)
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    batch = {name: v.to(DEVICES[0]) if torch.is_tensor(v) else v for name, v in BATCH.items()}
    loss = model(**batch).loss
    (loss + oftfx.penalty(model).to(loss.device)).backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_step_and_a_fold_are_those_of_one_device(spec, tmp_path):
    base = llama(tied=False).to(DEVICES[0])
    one, several = adapted(base, spec), adapted(split(), spec)
    places = {name: value.device for name, value in several.named_parameters()}
    for name, module in several.named_modules():
        if isinstance(module, oftfx.modules.Adapted):
            assert {places[key] for key in places if key.startswith(f"{name}.")} == {
                module.weight.device
            }
    assert len(set(places.values())) == len(set(DEVICES))

    before = [copy.deepcopy(testing.thetas(model)) for model in (one, several)]
    losses = [learned(model) for model in (one, several)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, value in testing.thetas(one).items():
        assert not torch.equal(value, before[0][name])
    for name, mine in supports(one).items():  # the same directions, up to signs and rounding
        both = (mine, supports(several)[name].to(mine))
        ours, theirs = (torch.linalg.qr(vectors.double().mT)[0] for vectors in both)
        assert (ours.mT @ theirs).square().sum().item() == pytest.approx(len(mine))
    torch.testing.assert_close(
        oftfx.health(one).norm, oftfx.health(several).norm.to(DEVICES[0]), rtol=1e-3, atol=1e-6
    )

    ids = tokens()["input_ids"].to(DEVICES[0])
    expected = several.eval()(ids).logits
    oftfx.save(several, tmp_path)
    loaded = oftfx.load(llama(tied=False).to(DEVICES[0]), tmp_path).eval()
    for model in (loaded, oftfx.merge(several)):
        found = model(ids).logits.to(expected.device)
        testing.assert_close(found.detach(), expected.detach(), "logits")


def supports(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if name.endswith("support")}
