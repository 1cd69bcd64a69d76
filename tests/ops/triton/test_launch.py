"""Launches: the first by Triton, all others by PyTorch's launcher, with the same arguments."""

import importlib
import inspect
import pkgutil
import typing
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

import oftfx.ops.triton as kernels
from oftfx.ops.triton import launch
from oftfx.ops.triton.launch import Launch

SIZE = 64
HUGE = 2**40


@triton.jit(do_not_specialize=["count"])
def _strided(
    source: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    step: tl.tensor,
    huge: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    """``out_i = source[i·step] + huge``."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = i < count
    tl.store(out + i, tl.load(source + i * step, there, 0) + huge, there)


def strided(count: int, step: int) -> Launch:
    return Launch(_strided, triton.cdiv(count, SIZE), (count, step, HUGE), (SIZE,), num_warps=2)


class Recorder:
    """PyTorch's bindings with a launcher that keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self._StaticCudaLauncher = SimpleNamespace(_launch_kernel=self._launch)
        self._cuda_getCurrentRawStream = lambda index: 7 + index

    def _launch(self, *args) -> None:
        self.calls.append(args)
        if torch.cuda.is_available():
            torch._C._StaticCudaLauncher._launch_kernel(*args)


def compiled(**differences) -> SimpleNamespace:
    """What Triton compiles `_strided` to for a step of 1, which it makes a constant of."""
    meta = {
        "num_warps": 2,
        "shared": 128,
        "num_ctas": 1,
        "launch_pdl": False,
        "launch_cooperative_grid": False,
        "global_scratch_size": 0,
        "profile_scratch_size": 0,
    }
    meta = {k: v for k, v in (meta | differences).items() if v is not None}
    types = ("*i64", "*i64", "i32", "constexpr", "i64", "constexpr")
    names = ("source", "out", "count", "step", "huge", "SIZE")
    ran: list[tuple] = []
    signature = dict(zip(names, types, strict=True))

    class Code(SimpleNamespace):
        def __getitem__(self, grid):
            return lambda *args: ran.append((grid, *args))

    source = SimpleNamespace(signature=signature, fn=SimpleNamespace(arg_names=list(names)))
    return Code(metadata=SimpleNamespace(**meta), src=source, function=99, ran=ran)


TENSORS = [SimpleNamespace(device=torch.device("cuda:2"))] * 2


def test_constants_are_no_arguments_of_the_code(monkeypatch):
    monkeypatch.setattr(launch, "_C", recorder := Recorder())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code = compiled()
    launch._direct(code, 5, TENSORS, (300, 1, HUGE, SIZE))([16, 32])
    args = (16, 32, 300, HUGE, None, None)  # and two scratch spaces that are not there
    assert recorder.calls == [(99, 5, 1, 1, 2, 128, "OOilOO", args, 9)]
    assert not code.ran


def test_older_code_has_no_scratch_space_for_an_argument(monkeypatch):
    monkeypatch.setattr(launch, "_C", recorder := Recorder())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    launch._direct(compiled(profile_scratch_size=None), 5, TENSORS, (300, 1, HUGE, SIZE))([16, 32])
    assert recorder.calls[0][6:8] == ("OOilO", (16, 32, 300, HUGE, None))


@pytest.mark.parametrize(
    "needs",
    [
        {"num_ctas": 2},
        {"launch_pdl": True},
        {"launch_cooperative_grid": True},
        {"global_scratch_size": 64},
        {"profile_scratch_size": 64},
        {"instrumentation_mode": "gsan"},
    ],
)
def test_code_that_needs_more_is_launched_by_triton(needs, monkeypatch):
    monkeypatch.setattr(launch, "_C", recorder := Recorder())
    code = compiled(**needs)
    launch._direct(code, 5, TENSORS, (300, 1, HUGE, SIZE))([16, 32])
    assert code.ran == [((5, 1, 1), 16, 32, 300, 1, HUGE, SIZE)]
    assert not recorder.calls


def test_numbers_of_a_type_that_pytorchs_launcher_may_not_take_are_left_to_triton(monkeypatch):
    monkeypatch.setattr(launch, "_C", recorder := Recorder())
    code = compiled()
    code.src.signature["huge"] = "fp64"
    launch._direct(code, 5, TENSORS, (300, 1, 2.5, SIZE))([16, 32])
    assert code.ran == [((5, 1, 1), 16, 32, 300, 1, 2.5, SIZE)]
    assert not recorder.calls


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_who_asked_triton_to_tell_of_launches_is_told(hook, monkeypatch):
    monkeypatch.setattr(launch, "_C", recorder := Recorder())
    monkeypatch.setattr(launch.knobs.runtime, hook, SimpleNamespace(calls=[print]))
    launch._direct(code := compiled(), 5, TENSORS, (300, 1, HUGE, SIZE))([16, 32])
    assert code.ran
    assert not recorder.calls


def test_without_pytorchs_launcher_triton_launches(monkeypatch):
    monkeypatch.setattr(launch, "_C", SimpleNamespace())
    launch._direct(code := compiled(), 5, TENSORS, (300, 1, HUGE, SIZE))([16, 32])
    assert code.ran


def kept_launches() -> list:
    """The functions that keep a launch for each problem they were asked for."""
    modules = [
        importlib.import_module(f"{kernels.__name__}.{found.name}")
        for found in pkgutil.iter_modules(kernels.__path__)
    ]
    functions = [f for module in modules for f in vars(module).values() if hasattr(f, "cache_info")]
    return [f for f in functions if returns(f) & {"Launch", "Work"}]


def returns(function) -> set[str]:
    return {getattr(inspect.signature(function).return_annotation, "__name__", "")}


def told(annotation) -> set:
    """The types that an argument holds, those of a tuple or a tuple's fields among them."""
    inside = [*typing.get_args(annotation), *getattr(annotation, "__annotations__", {}).values()]
    return {annotation}.union(*map(told, inside))


def test_a_launch_is_kept_for_one_device_and_dtype():
    """Triton looks at neither after the first, and other code would read other bytes."""
    found = kept_launches()
    assert len({f.__module__ for f in found}) >= 12
    for function in found:
        parameters = inspect.signature(function).parameters.values()
        types = set().union(*(told(parameter.annotation) for parameter in parameters))
        assert {torch.device, torch.dtype} <= types, f"{function.__module__}.{function.__name__}"


@pytest.mark.parametrize("step", [1, 3])
def test_every_launch_gives_what_the_first_gives(step, device, monkeypatch):
    monkeypatch.setattr(launch, "_C", recorder := Recorder())
    recorder._cuda_getCurrentRawStream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    run = strided(1000, step)
    for times in range(4):
        # The third is not aligned, for which Triton has other code.
        source = torch.arange(5000, device=device)[times == 2 :]
        out = torch.full((1024,), -1, device=device)
        run(source, out)
        assert torch.equal(out[:1000], source[: 1000 * step : step] + HUGE)
        assert (out[1000:] == -1).all()
    assert len(recorder.calls) == (2 if device.type == "cuda" else 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_launches_are_on_the_current_stream_and_in_a_graph_that_is_captured(monkeypatch):
    monkeypatch.setattr(launch, "_C", recorder := Recorder())
    recorder._cuda_getCurrentRawStream = torch._C._cuda_getCurrentRawStream
    run = strided(1000, 1)
    source, out = torch.arange(1000, device="cuda:0"), torch.zeros(1000, device="cuda:0").long()
    run(source, out)  # compiles
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        run(source, out)
    assert len(recorder.calls) == 1
    out.zero_()
    source += 1
    graph.replay()
    assert torch.equal(out, source + HUGE)
