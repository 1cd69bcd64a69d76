"""How far rotations have turned and how orthogonal they are, against an SVD."""

import copy
import math
import warnings

import pytest
import torch
from torch import fx, nn

import oftfx
from oftfx import LOFT, OFT, OftfxWarning, PlanError
from oftfx.rotations import cayley, oft

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.a(x) * self.b(x))


KINDS = ("module", "symbolic", "exported")


def adapted(kind: str, spec: OFT, scale: float = 0.1):
    """A model of this kind whose rotations have turned."""
    model = Net()
    if kind == "symbolic":
        model = fx.symbolic_trace(model)
    elif kind == "exported":
        model = torch.export.export(model, (X,))
    model = oftfx.adapt(model, spec, example_inputs=X if kind == "module" else None)
    turn(model, scale)
    return model


def turn(model, scale: float) -> None:
    with torch.no_grad():
        for theta in oftfx.parameters(model):
            theta.normal_(std=scale)


def real(theta: torch.Tensor, spec: OFT) -> tuple[float, float]:
    """The worst block's ‖Q‖₂ and ‖RᵀR − I‖₂, by SVD in float64."""
    theta = theta.detach().double()
    q = cayley.skew(theta, spec.block_size)
    r = torch.eye(spec.block_size, dtype=torch.float64) + oft.core(theta, spec)
    defect = r.mT @ r - torch.eye(spec.block_size, dtype=torch.float64)
    norms = [torch.linalg.matrix_norm(matrix, ord=2).max() for matrix in (q, defect)]
    return float(norms[0]), float(norms[1])


SPECS = {
    "k=4": OFT(block_size=4),
    "k=3": OFT(block_size=4, order=3),
    "k=1, b=8": OFT(block_size=8, order=1),
    "exact": OFT(block_size=4, exact=True),
    "bf16": OFT(block_size=4, dtype=torch.bfloat16),
    "per layer": OFT(block_size=4, overrides={"a": {"block_size": 8}, "out": {"order": 2}}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPECS)
def test_norm_and_error_are_the_real_ones(kind, name):
    spec = SPECS[name]
    model = adapted(kind, spec)
    found = oftfx.health(model)
    assert sorted(found.fqns) == ["a", "b", "out"]
    assert found.norm.shape == found.orthogonality_error.shape == (3,)
    rows = zip(found.fqns, found.norm, found.orthogonality_error, found.thetas, strict=True)
    for fqn, norm, error, theta in rows:
        at = spec.at(fqn)
        real_norm, real_error = real(theta, at)
        assert 0.01 < real_norm < 1
        assert real_norm * (1 - 1e-5) <= float(norm) <= 1.01 * real_norm
        # The norm is an upper bound within 1 %, and the error grows at most by its power.
        order = None if at.exact else at.order
        most = cayley.orthogonality_error(torch.tensor(1.01 * real_norm).double(), order)
        # 1e-14: the SVD of RᵀR − I sees rounding where the law says zero or less.
        assert real_error - 1e-14 <= float(error) * (1 + 1e-4)
        assert float(error) <= float(most) * (1 + 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_report_the_same(kind):
    spec = OFT(block_size=4, init_std=0.2)
    plain = oftfx.health(oftfx.adapt(Net(), spec, example_inputs=X))
    model = Net()
    if kind == "symbolic":
        model = fx.symbolic_trace(model)
    elif kind == "exported":
        model = torch.export.export(model, (X,))
    found = oftfx.health(oftfx.adapt(model, spec, example_inputs=X))
    theirs = dict(zip(found.fqns, found.norm.tolist(), strict=True))
    assert theirs == dict(zip(plain.fqns, plain.norm.tolist(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_rotations_have_not_turned(kind):
    found = oftfx.health(adapted(kind, OFT(block_size=4), scale=0.0))
    assert not found.norm.any()
    assert not found.orthogonality_error.any()
    assert not found.angle.any()


def test_angle_is_the_largest_turn():
    model = adapted("module", OFT(block_size=2, exact=True, targets="a"), scale=0.0)
    (theta,) = oftfx.parameters(model)
    with torch.no_grad():
        theta[0], theta[1] = 0.5, -0.25
    found = oftfx.health(model)
    assert float(found.angle) == pytest.approx(2 * math.atan(0.5), rel=1e-5)
    r = torch.eye(2) + oft.core(theta.detach(), OFT(block_size=2, exact=True))[0]
    turned = math.acos(float(r[0, 0]))
    assert float(found.angle) == pytest.approx(turned, rel=1e-4)
    assert f"{math.degrees(turned):.2f}" in str(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_rotation_counts_once(kind):
    found = oftfx.health(adapted(kind, OFT(block_size=4, share_inputs=True)))
    assert len(found.fqns) == 2
    assert len({id(theta) for theta in found.thetas}) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_of_several(kind):
    model = adapted(kind, OFT(block_size=4, targets=["a", "b"]))
    model = oftfx.adapt(
        model, OFT(block_size=2, targets="out"), "second", X if kind == "module" else None
    )
    assert oftfx.health(model, "second").fqns == ("out",)
    assert sorted(oftfx.health(model, "default").fqns) == ["a", "b"]
    assert len(oftfx.health(model).fqns) == 3
    with pytest.raises(PlanError, match="no adapter 'third'"):
        oftfx.health(model, "third")


def test_a_bare_model_has_no_health():
    with pytest.raises(PlanError, match="no adapter"):
        oftfx.health(Net())


@pytest.mark.parametrize("guard", [None, "rescale", "exact"])
def test_nothing_waits_for_the_device(guard):
    """On `meta` there are no values: any look at one raises."""
    with torch.device("meta"):
        model = oftfx.adapt(Net(), OFT(block_size=4, guard=guard), capture="modules")
    found = oftfx.health(model)
    assert found.norm.device.type == found.orthogonality_error.device.type == "meta"
    assert found.angle.device.type == "meta"


def test_health_records_no_gradient_and_moves_nothing():
    model = adapted("module", OFT(block_size=4))
    before = copy.deepcopy(model.state_dict())
    found = oftfx.health(model)
    assert not found.norm.requires_grad
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_a_compiled_model_has_the_health_of_what_it_wraps():
    model = adapted("module", OFT(block_size=4))
    assert torch.equal(oftfx.health(torch.compile(model)).norm, oftfx.health(model).norm)


def test_prints_a_table():
    text = str(oftfx.health(adapted("module", OFT(block_size=4))))
    assert text.split("\n")[0].split() == ["site", "‖Q‖", "degrees", "orthogonality"]
    assert len(text.split("\n")) == 5


# --- warnings ---


def outside(*names: str) -> nn.Module:
    """A model whose rotations at these sites have left the disc."""
    model = adapted("module", OFT(block_size=4), scale=0.01)
    for name in names:
        with torch.no_grad():
            model.get_submodule(name).oft["default"].theta.fill_(2.0)
    return model


def test_leaving_the_disc_warns_once_a_site():
    model = outside("a")
    with pytest.warns(OftfxWarning, match=r"‖Q‖ ≥ 1 at 1 sites \(a\)"):
        oftfx.health(model).warn()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oftfx.health(model).warn()
    with torch.no_grad():
        model.b.oft["default"].theta.fill_(2.0)
    with pytest.warns(OftfxWarning, match=r"\(b\)"):
        oftfx.health(model).warn()


def test_inside_the_disc_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oftfx.health(outside()).warn()


def test_another_model_warns_again():
    for _ in range(2):
        with pytest.warns(OftfxWarning, match=r"\(out\)"):
            oftfx.health(outside("out")).warn()


def test_a_free_map_comes_from_no_series():
    model = adapted("module", LOFT(rank=4, support="principal", core="free"), scale=3.0)
    found = oftfx.health(model)
    assert (found.norm > 1).all()
    assert not found.diverged.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.warn()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_rotation_warns(value):
    model = outside()
    with torch.no_grad():
        model.a.oft["default"].theta[0, 0] = value
    with pytest.warns(OftfxWarning, match=r"\(a\)"):
        oftfx.health(model).warn()


# --- guards ---


@pytest.mark.parametrize("kind", KINDS)
def test_rescale_keeps_the_norm_in_the_disc(kind):
    model = adapted(kind, OFT(block_size=4, guard="rescale"), scale=3.0)
    found = oftfx.health(model)
    assert (found.norm <= cayley.DISC).all()
    assert (found.norm > 0.99 * cayley.DISC).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.warn()
    for theta, error in zip(found.thetas, found.orthogonality_error, strict=True):
        spec = OFT(block_size=4, guard="rescale")
        assert float(error) >= real(theta, spec)[1] * (1 - 1e-4)
        assert oft.norm(theta.detach(), spec).max() <= cayley.DISC


@pytest.mark.parametrize("kind", KINDS)
def test_exact_guard_stays_orthogonal(kind):
    spec = OFT(block_size=4, guard="exact")
    model = adapted(kind, spec, scale=3.0)
    found = oftfx.health(model)
    for theta, norm, error in zip(found.thetas, found.norm, found.orthogonality_error, strict=True):
        real_norm, real_error = real(theta, spec)
        assert real_norm > 1
        assert float(norm) >= real_norm * (1 - 1e-5)
        assert real_error <= float(error) + 1e-12
        inside = cayley.orthogonality_error(torch.tensor(cayley.DISC), 4)
        assert float(error) <= float(inside)


@pytest.mark.parametrize("guard", ["rescale", "exact"])
def test_a_guarded_model_learns_outside_the_disc(guard):
    """The gradient through the whole model, against finite differences."""
    model = Net().double()
    spec = OFT(block_size=4, guard=guard, dtype=torch.float64, targets=["a", "out"])
    oftfx.adapt(model, spec, example_inputs=X.double())
    thetas = oftfx.parameters(model)
    with torch.no_grad():
        thetas[0][0].fill_(1.5)  # one block outside, the rest inside
        thetas[1].fill_(0.1)

    def loss(*values):
        held = torch.func.functional_call(
            model, dict(zip(("a.oft.default.theta", "out.oft.default.theta"), values, strict=True)),
            X.double(),
        )  # fmt: skip
        return held.square().sum()

    inputs = tuple(theta.detach().clone().requires_grad_() for theta in thetas)
    assert torch.autograd.gradcheck(loss, inputs)
