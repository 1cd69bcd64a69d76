"""The CPU kernels: PyTorch's results, the same bits always, and PyTorch itself where they fail."""

import ctypes
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oftfx import ops
from oftfx.ops import packed
from oftfx.ops.kernels import kernels
from oftfx.ops.native import (
    build,
    cayley,
    dequantise,
    fold,
    fold_grad,
    glu_rotate,
    rms_rotate,
    rotate,
    rotate_group,
)
from oftfx.ops.native.binding import library
from oftfx.rotations import cayley as maths
from tests.packed import random_packed

CPU = torch.device("cpu")
load = library.__wrapped__  # without its cache
needs_a_compiler = pytest.mark.skipif(library() is None, reason="no C compiler")


def case(rows: int, n: int, b: int, count: int = 1):
    """x, cores and gradients of `count` rotations."""
    cores = [0.2 * torch.randn(n, b, b) for _ in range(count)]
    return torch.randn(rows, n * b), cores, [torch.randn(rows, n * b) for _ in range(count)]


def doubles(tensors):
    return [tensor.double() for tensor in tensors]


def check(x, cores, grads):
    """Against PyTorch in float64; a core's gradient sums over all rows, the rest over b."""
    outs = rotate_group.rotate_group(x, cores)
    reference = ops.rotate_group(x.double(), doubles(cores))
    torch.testing.assert_close(doubles(outs), reference, rtol=1e-5, atol=1e-5)
    grad_x, grad_cores = rotate_group.rotate_group_grad(grads, x, cores, True, True)
    expected_x, expected_cores = ops.rotate_group_grad(
        doubles(grads), x.double(), doubles(cores), True, True
    )
    torch.testing.assert_close(grad_x.double(), expected_x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(doubles(grad_cores), expected_cores, rtol=1e-5, atol=1e-4)


def check_fold(weight, core, grad):
    """Folding has the bits of a rotation by the transposed core; and its gradient, float64's."""
    turned = fold.folded(weight, core, torch.float32, None)
    assert torch.equal(turned, rotate.rotate(weight, core.mT, 1))
    gram = ops.block_gram(weight.double(), grad.double(), core.double())
    turn = torch.eye(core.shape[-1], dtype=torch.float64) + core.double()
    expected = gram @ torch.linalg.inv(turn).mT
    got = fold_grad.core_grad(grad, weight, core).double()
    assert (got - expected).norm() <= 1e-5 * expected.norm()


@needs_a_compiler
@given(
    rows=st.integers(1, 130), n=st.integers(1, 5), b=st.integers(2, 49), seed=st.integers(0, 2**16)
)
def test_folds_of_any_size(rows, n, b, seed):
    torch.manual_seed(seed)
    weight, (core,), (grad,) = case(rows, n, b)
    check_fold(weight, core / b**0.5, grad)


@needs_a_compiler
@pytest.mark.parametrize(("rows", "n", "b"), [(1100, 2, 32), (300, 1, 256)])
def test_large_folds(rows, n, b):
    """Rows that are cut into runs, and the widest block."""
    weight, (core,), (grad,) = case(rows, n, b)
    check_fold(weight, core / b**0.5, grad)


@needs_a_compiler
@given(
    rows=st.integers(0, 130),
    n=st.integers(1, 5),
    b=st.integers(2, 49),
    count=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_rotations_of_any_size(rows, n, b, count, seed):
    """Also of those that `fits` leaves to PyTorch, for speed alone."""
    torch.manual_seed(seed)
    check(*case(rows, n, b, count))


@needs_a_compiler
@pytest.mark.parametrize("b", [16, 32, 33, 48, 64, 80, 128, 255, 256])
@pytest.mark.parametrize("rows", [1, 57])
def test_wide_blocks(b, rows):
    check(*case(rows, 2, b))


@needs_a_compiler
@pytest.mark.parametrize(("rows", "n", "b"), [(1030, 1, 32), (600, 3, 16), (2000, 40, 17)])
def test_many_rows_are_cut_into_runs(rows, n, b):
    check(*case(rows, n, b, 2))


@needs_a_compiler
@given(
    out=st.integers(1, 70),
    n=st.integers(1, 5),
    b=st.sampled_from([16, 32, 48, 256]),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from([32, 64, 4096]),
    double=st.booleans(),
    seed=st.integers(0, 99),
)
def test_4_bit_weights_of_any_size(out, n, b, quant_type, block_size, double, seed):
    """Also of those that `fits` leaves to PyTorch, for bitsandbytes' sake alone."""
    torch.manual_seed(seed)
    weight = random_packed(out, n * b, quant_type, block_size, double)
    core = 0.2 * torch.randn(n, b, b)
    exact = packed.dequantised(weight, torch.float32)
    assert torch.equal(dequantise.dequantised(weight, torch.float32), exact)
    folded = dequantise.folded(weight, core, torch.float32)
    assert torch.equal(folded, fold.folded(exact, core, torch.float32, None))
    assert torch.equal(dequantise.folded(weight, 0 * core, torch.float32), exact)


@needs_a_compiler
def test_a_4_bit_weight_gives_the_same_bits_on_any_number_of_threads():
    weight, core = random_packed(600, 96, double=True), 0.2 * torch.randn(3, 32, 32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(dequantise.folded(weight, core, torch.float32))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_a_compiler
@given(b=st.integers(2, 40), order=st.integers(1, 9), n=st.integers(0, 4), seed=st.integers(0, 99))
def test_cores_of_any_size(b, order, n, seed):
    torch.manual_seed(seed)
    theta, grad = torch.randn(n, b * (b - 1) // 2) / (2 * b), torch.randn(n, b, b)
    q = maths.skew(theta.double(), b)
    core = cayley.cayley(theta, b, order)
    torch.testing.assert_close(core.double(), maths.neumann(q, order), rtol=1e-5, atol=1e-6)
    expected = maths.skew_grad(maths.neumann_grad(q, order, grad.double()))
    result = cayley.cayley_grad(grad, theta, b, order)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-4)


@needs_a_compiler
def test_the_widest_cores():
    theta, grad = torch.randn(2, 256 * 255 // 2) / 512, torch.randn(2, 256, 256)
    core, reference = (ops.cayley(t, 256, 4) for t in (theta, theta.double()))
    torch.testing.assert_close(core.double(), reference, rtol=1e-5, atol=1e-6)
    result = ops.cayley_grad(grad, theta, 256, 4)
    reference = ops.cayley_grad(grad.double(), theta.double(), 256, 4)
    torch.testing.assert_close(result.double(), reference, rtol=1e-5, atol=1e-4)


SIZES = [(1, 1, 16), (7, 2, 32), (57, 3, 48), (1030, 1, 32), (600, 3, 16), (50, 130, 32)]
WIDE = [(40, 1, 256), (33, 2, 128)]


@needs_a_compiler
@pytest.mark.parametrize(("rows", "n", "b"), SIZES + WIDE)
@pytest.mark.parametrize("activation", glu_rotate.ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_gated_layers_of_any_size(rows, n, b, activation, gated):
    gate, (core,), (grad,) = case(rows, n, b)
    gate *= 3
    up = torch.randn_like(gate) if gated else None
    double = gate.double(), None if up is None else up.double(), core.double(), activation
    out = glu_rotate.glu_rotate(gate, up, core, activation)
    expected = ops.glu_rotate(*double)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    got = glu_rotate.glu_rotate_grad(grad, gate, up, core, activation, True, True)
    expected = ops.glu_rotate_grad(grad.double(), *double, True, True)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)
    for wanted in ((True, False), (False, True)):
        some = glu_rotate.glu_rotate_grad(grad, gate, up, core, activation, *wanted)
        for ours, all_of_it in zip(some, got, strict=True):
            assert not ours.numel() or torch.equal(ours, all_of_it)


@needs_a_compiler
@pytest.mark.parametrize("activation", glu_rotate.ACTIVATIONS)
def test_activations_at_their_ends(activation):
    """Where an exponential would overflow, and nearest to where it gives nothing."""
    gate = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 20, -20, 88, -88, 104, -104, 1e4, -1e4])
    gate = torch.cat([gate, torch.linspace(-12, 12, 4 * 128 - len(gate))]).reshape(4, 128)
    core, up, grad = torch.zeros(4, 32, 32), torch.ones(4, 128), torch.ones(4, 128)
    out = glu_rotate.glu_rotate(gate, up, core, activation)
    got = glu_rotate.glu_rotate_grad(grad, gate, up, core, activation, True, False)
    double = gate.double(), up.double(), core.double(), activation
    expected = ops.glu_rotate_grad(grad.double(), *double, True, False)
    torch.testing.assert_close(out.double(), ops.glu_rotate(*double), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=1e-6, atol=1e-6)


@needs_a_compiler
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_a_gate_that_is_no_number_spoils_its_own_place_alone(value):
    gate, (core,), (grad,) = case(9, 2, 16)
    up = torch.randn_like(gate)
    clean = glu_rotate.glu_rotate_grad(grad, gate, up, core, "silu", True, False)
    gate[3, 5] = value
    got = glu_rotate.glu_rotate_grad(grad, gate, up, core, "silu", True, False)
    for ours, before in zip(got[:2], clean[:2], strict=True):
        ours[3, 5] = before[3, 5] = 0
        assert torch.equal(ours, before)


@needs_a_compiler
@pytest.mark.parametrize(("rows", "n", "b"), SIZES + WIDE)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("weighted", [True, False])
def test_norms_of_any_size(rows, n, b, count, weighted):
    x, cores, grads = case(rows, n, b, count)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    weight = 1 + 0.3 * torch.randn(n * b) if weighted else None
    grad_x, grad_cores = rms_rotate.rms_rotate_grad(grads, x, rstd, weight, cores, True)
    double = (
        doubles(grads),
        x.double(),
        rstd.double(),
        weight if weight is None else weight.double(),
    )
    expected_x, expected = ops.rms_rotate_grad(*double, doubles(cores), True)
    torch.testing.assert_close(grad_x.double(), expected_x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(doubles(grad_cores), expected, rtol=1e-5, atol=1e-4)
    alone, empty = rms_rotate.rms_rotate_grad(grads, x, rstd, weight, cores, False)
    assert torch.equal(alone, grad_x)
    assert not any(grad.numel() for grad in empty)


@needs_a_compiler
@pytest.mark.parametrize(("rows", "n", "b"), [(700, 3, 32), (1100, 1, 64), (200, 40, 16)])
def test_the_same_bits_on_any_number_of_threads(rows, n, b):
    x, cores, grads = case(rows, n, b, 3)
    theta = torch.randn(400, b * (b - 1) // 2) / (2 * b)

    def results():
        grad_x, grad_cores = ops.rotate_group_grad(grads, x, cores, True, True)
        core = ops.cayley(theta, b, 4)
        grad_theta = ops.cayley_grad(core, theta, b, 4)
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True))
        normed, normed_cores = ops.rms_rotate_grad(grads, x, rstd, None, cores, True)
        gated = ops.glu_rotate_grad(grads[0], x, grads[1], cores[0], "silu", True, True)
        found = [*ops.rotate_group(x, cores), grad_x, *grad_cores, core, grad_theta]
        return [*found, normed, *normed_cores, *gated]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = results()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))
    finally:
        torch.set_num_threads(before)


@needs_a_compiler
def test_a_row_and_a_core_give_the_same_bits_alone_and_among_others():
    x, (core,), _ = case(100, 3, 32)
    together = ops.rotate(x, core)
    assert all(
        torch.equal(ops.rotate(row, core), out) for row, out in zip(x, together, strict=True)
    )
    theta = torch.randn(5, 496) / 64
    alone = torch.stack([ops.cayley(one, 32, 4) for one in theta])
    assert torch.equal(ops.cayley(theta, 32, 4), alone)


@needs_a_compiler
def test_a_zero_core_is_the_identity_to_the_last_bit():
    info = torch.finfo(torch.float32)
    edges = torch.tensor([0.0, info.max, -info.max, info.tiny, info.smallest_normal / 2, 1 / 3])
    x = torch.cat([edges, torch.randn(10 * 96 - 6)]).reshape(10, 96)
    core = torch.zeros(3, 32, 32)
    (out,) = rotate_group.rotate_group(x, [core])
    assert torch.equal(out, x)
    grad_x, _ = rotate_group.rotate_group_grad([x], x, [core], True, True)
    assert torch.equal(grad_x, x)


@needs_a_compiler
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("b", [32, 7])
def test_infinities_and_nans_go_where_pytorch_sends_them(value, b):
    x, (core,), (grad,) = case(50, 3, b)
    x[3, 1] = grad[7, b + 2] = value
    core[2, 1, 3] = value
    (out,) = rotate_group.rotate_group(x, [core])
    grad_x, (grad_core,) = rotate_group.rotate_group_grad([grad], x, [core], True, True)
    expected = ops.rotate(x.double(), core.double())
    gradients = ops.rotate_grad(grad.double(), x.double(), core.double(), True, True)
    for ours, theirs in ((out, expected), (grad_x, gradients[0]), (grad_core, gradients[1])):
        assert not theirs.isfinite().all()
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4, equal_nan=True)
    theta = torch.randn(3, b * (b - 1) // 2) / (2 * b)
    theta[1, 0] = value
    expected = ops.cayley(theta.double(), b, 4)
    core = cayley.cayley(theta, b, 4)
    assert torch.equal(core.isfinite(), expected.isfinite())
    assert torch.equal(core.isnan(), expected.isnan())


@needs_a_compiler
def test_strided_operands_cores_of_other_dtypes_and_one_core_for_all():
    x, core, grad = torch.randn(64, 50).T, torch.randn(2, 32, 32).mT * 0.1, torch.randn(50, 1)
    grad = grad.expand(50, 64)
    for core_dtype in (torch.float32, torch.float64):
        out, grad_x, grad_core = (
            ops.rotate(x, core.to(core_dtype)),
            *ops.rotate_grad(grad, x, core.to(core_dtype), True, True),
        )
        assert grad_core.dtype == core_dtype
        double = (x.double(), core.double())
        expected = ops.rotate(*double), *ops.rotate_grad(grad.double(), *double, True, True)
        for ours, theirs in zip((out, grad_x, grad_core), expected, strict=True):
            assert ours.is_contiguous()
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    shared = core[:1]
    torch.testing.assert_close(ops.rotate(x, shared), ops.rotate(x, shared.expand(2, 32, 32)))


@needs_a_compiler
def test_what_tensors_are_by_default_does_not_matter():
    x, cores, grads = case(20, 2, 32)
    theta, weight = torch.randn(2, 496) / 64, random_packed(32, 64)

    def results():
        core = ops.cayley(theta, 32, 4)
        rotated = ops.rotate_group_grad(grads, x, cores, True, True)
        return (
            core,
            ops.cayley_grad(core, theta, 32, 4),
            rotated[0],
            *rotated[1],
            (dequantise.dequantised(weight, torch.float32)),
        )

    expected = results()
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            got = results()
    finally:
        torch.set_default_dtype(dtype)
    assert all(map(torch.equal, got, expected))


@needs_a_compiler
def test_the_ops_run_them():
    x, (core,), (grad,) = case(20, 2, 32)
    assert torch.equal(ops.rotate(x, core), rotate.rotate(x, core, 1))
    expected = rotate.rotate_grad(grad, x, core, True, False, 1)
    assert all(map(torch.equal, ops.rotate_grad(grad, x, core, True, False), expected))
    theta = torch.randn(2, 496) / 64
    assert torch.equal(ops.cayley(theta, 32, 4), cayley.cayley(theta, 32, 4))


@needs_a_compiler
def test_pytorch_keeps_other_dtypes_exact_cores_and_widths_that_fill_no_vector():
    assert kernels("rotate", CPU) is rotate
    assert rotate.fits(torch.ones(2, 64), torch.ones(2, 32, 32), 1)
    assert not rotate.fits(torch.ones(2, 64), torch.ones(2, 32, 32), 2)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert not rotate.fits(
            torch.ones(2, 64, dtype=dtype), torch.ones(2, 32, 32, dtype=dtype), 1
        )
        assert not cayley.fits(torch.ones(2, 496, dtype=dtype), 32, 4)
    assert not rotate.fits(torch.ones(2, 66), torch.ones(2, 33, 33), 1)
    assert not cayley.fits(torch.ones(2, 496), 32, None)


# --- how they come to be ---


@pytest.fixture
def kept():
    """The library that the other tests use, from the user's own cache."""
    return build.built()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "oftfx"


def refused(caplog) -> str:
    """Loads in vain; what was logged, once."""
    with caplog.at_level("INFO", logger="oftfx"):
        assert load() is None
    (record,) = caplog.records
    return record.getMessage()


@needs_a_compiler
def test_built_once_and_kept(cache):
    first = build.built()
    stamp = first.stat().st_mtime_ns
    assert build.built() == first
    assert first.stat().st_mtime_ns == stamp
    assert list(cache.iterdir()) == [first]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@needs_a_compiler
def test_many_may_build_at_once(cache):
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: build.built(), range(2)))
    assert all(ctypes.CDLL(str(path)).oftfx_rotate for path in found)
    assert set(cache.iterdir()) == set(found)


@needs_a_compiler
@pytest.mark.parametrize("damage", [b"", b"not a library", None])
def test_a_damaged_library_is_built_again(kept, cache, damage):
    whole = kept.read_bytes()
    cache.mkdir(0o700)
    (cache / kept.name).write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    again = build.built()
    assert ctypes.CDLL(str(again)).oftfx_rotate
    assert list(cache.iterdir()) == [again]
    assert again.name == kept.name


@needs_a_compiler
def test_another_compiler_or_other_flags_have_a_library_of_their_own(kept, cache, monkeypatch):
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    assert build.built().name != kept.name


def test_the_environment_turns_them_off(cache, caplog, monkeypatch):
    monkeypatch.setenv("OFTFX_NATIVE", "0")
    assert "OFTFX_NATIVE=0" in refused(caplog)
    assert not cache.exists()


def test_without_a_compiler_pytorch_does_the_work(cache, caplog, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(cache))
    assert "no C compiler found" in refused(caplog)


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_a_compiler_that_fails_is_named(cache, caplog, monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    assert f"{compiler} " in refused(caplog)


@needs_a_compiler
def test_a_cache_that_cannot_be_written_is_named(cache, caplog):
    cache.write_text("in the way")
    assert f"the cache {cache} cannot be used" in refused(caplog)


@needs_a_compiler
def test_without_a_home_pytorch_does_the_work(caplog, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(build.Path, "home", nowhere)
    assert "no folder to keep them in" in refused(caplog)


def test_the_results_are_pytorchs_without_them():
    program = (
        "import torch; from oftfx import ops; from oftfx.ops.kernels import kernels;"
        "torch.manual_seed(0); x, c = torch.randn(9, 64), torch.randn(2, 32, 32);"
        "assert kernels('rotate', x.device) is None;"
        "assert torch.allclose(ops.rotate(x, c), x + torch.einsum('tnb,nbc->tnc',"
        " x.view(9, 2, 32), c).reshape(9, 64), atol=1e-4)"
    )
    env = os.environ | {"OFTFX_NATIVE": "0"}
    subprocess.run([sys.executable, "-c", program], env=env, check=True)


def test_importing_builds_nothing(cache):
    subprocess.run([sys.executable, "-c", "import oftfx, oftfx.ops"], check=True)
    assert not cache.exists()
