"""Models → graphs: nothing is touched, nothing is missed, and what fails says where."""

import copy
import importlib.util
import inspect
import warnings

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import fx, nn

import oftfx
from oftfx import OFT, CaptureError
from oftfx.capture import capture

SPEC = OFT(block_size=4)
OFTEN = torch._dynamo.config.recompile_limit + 1


class Block(nn.Module):
    """Two linears, a functional matmul, a buffer, and state that a forward would change."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 8)
        self.w = nn.Parameter(torch.randn(8, 8))
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return self.norm(self.fc2(self.dropout(F.relu(self.fc1(x)))) @ self.w)


def fqns(plan):
    return [site.fqn for site in plan.sites]


# --- the model stays as it is ---


@pytest.mark.parametrize("training", [True, False])
def test_planning_leaves_the_model_untouched(training):
    model = Block().train(training)
    model.fc1.weight.requires_grad_(False)
    fired = []
    model.fc1.register_forward_hook(lambda *args: fired.append(1))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    identities = {name: id(p) for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = dict(model.fc1._forward_hooks)
    random_state = torch.get_rng_state()

    oftfx.plan(model, SPEC, torch.randn(2, 8, device="meta"))

    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training is training for module in model.modules())
    assert {name: id(p) for name, p in model.named_parameters()} == identities
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [type(module) for module in model.modules()] == classes
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert dict(model.fc1._forward_hooks) == hooks
    assert list(model.state_dict()) == list(state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(p.grad is None for p in model.parameters())


def test_planning_does_not_use_up_the_recompile_limit():
    model, x = Block(), torch.randn(2, 8)
    plans = {oftfx.plan(model, SPEC, x).to_json() for _ in range(OFTEN)}
    assert len(plans) == 1
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    run = torch.compile(model, backend=count, fullgraph=True)
    model.eval()
    run(x), run(x)
    assert len(compiled) == 1


def test_needs_no_values_and_reads_none():
    with torch.device("meta"):
        model = Block()
    assert fqns(oftfx.plan(model, SPEC, torch.randn(2, 8))) == ["fc1", "fc2", "w"]


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_callers_modes_do_not_matter(mode):
    plain = oftfx.plan(Block(), SPEC, torch.randn(2, 8))
    with mode():
        assert oftfx.plan(Block(), SPEC, torch.randn(2, 8)) == plain


# --- every way to pass inputs ---


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 4)
        self.b = nn.Linear(12, 4)

    def forward(self, x, *, y, scale: float = 1.0):
        return self.a(x) + scale * self.b(y["inner"])


def test_example_inputs_may_be_a_tensor_a_tuple_or_a_dict():
    x = torch.randn(2, 8)
    plain = oftfx.plan(Block(), SPEC, x)
    assert oftfx.plan(Block(), SPEC, (x,)) == plain
    assert oftfx.plan(Block(), SPEC, [x]) == plain
    assert oftfx.plan(Block(), SPEC, {"x": x}) == plain
    two = {"x": x, "y": {"inner": torch.randn(2, 12)}, "scale": 2.0}
    assert fqns(oftfx.plan(Two(), SPEC, two)) == ["a", "b"]
    assert two["x"] is x  # the caller's own dict is as it was
    assert x.device.type == "cpu"


# --- graph breaks ---


class Broken(nn.Module):
    """Three linears with graph breaks between them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.a(x)
        torch._dynamo.graph_break()
        x = self.b(x)
        torch._dynamo.graph_break()
        return self.c(x)


class Layers(nn.Module):
    """The same broken code, several times over."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Broken() for _ in range(3))
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        x = self.layers[0](x)
        x = self.layers[1](x)
        x = self.layers[2](x)
        return self.head(x)


class Loop(Layers):
    """A break inside a loop makes Dynamo leave the whole frame to Python."""

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_graph_breaks_hide_nothing():
    plan = oftfx.plan(Broken(), SPEC, torch.randn(2, 8))
    assert fqns(plan) == ["a", "b", "c"]
    assert not plan.skipped
    assert len(capture(Broken(), torch.randn(2, 8)).graphs) == 3


def test_layers_that_share_a_broken_code_frame_are_all_found():
    plan = oftfx.plan(Layers(), SPEC, torch.randn(2, 8))
    wanted = {f"layers.{i}.{leaf}" for i in range(3) for leaf in "abc"} | {"head"}
    assert set(fqns(plan)) == wanted
    assert not plan.skipped


def test_what_a_broken_loop_hides_is_reported():
    """`head` is called from a frame that Dynamo skipped: no graph has it, so the plan says so."""
    plan = oftfx.plan(Loop(), SPEC, torch.randn(2, 8))
    assert {f"layers.{i}.{leaf}" for i in range(3) for leaf in "abc"} <= set(fqns(plan))
    assert "head" in {*fqns(plan), *(skip.name for skip in plan.skipped)}


def test_planning_with_graph_breaks_can_be_repeated():
    model, x = Layers(), torch.randn(2, 8)
    assert len({oftfx.plan(model, SPEC, x).to_json() for _ in range(OFTEN)}) == 1


def test_planning_with_graph_breaks_leaves_room_for_compiling():
    model, x = Layers(), torch.randn(2, 8)
    for _ in range(OFTEN):
        oftfx.plan(model, SPEC, x)
    frames = []

    def count(graph, inputs):
        frames.append(graph)
        return graph.forward

    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend=count)(x), expected)
    assert frames  # not one frame fell back to eager because planning had used its limit up


def test_a_checkpointed_region_hides_nothing():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            run = torch.utils.checkpoint.checkpoint
            return run(lambda t: self.b(F.relu(self.a(t))), x, use_reentrant=False)

    plan = oftfx.plan(Checkpointed(), SPEC, torch.randn(2, 8))
    assert fqns(plan) == ["a", "b"]
    assert not plan.skipped


def test_modules_that_hold_loose_tensors_can_be_traced():
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.scale = torch.ones(8)
            self.more = [torch.ones(8), {"shift": torch.zeros(8)}]

        def forward(self, x):
            return self.fc(x * self.scale) * self.more[0] + self.more[1]["shift"]

    model = Loose()
    assert fqns(oftfx.plan(model, SPEC, torch.randn(2, 8))) == ["fc"]
    assert model.more[0].device.type == "cpu"


def test_code_that_indexes_with_a_list_can_be_traced():
    """As transformers' Falcon does."""

    class Last(Block):
        def forward(self, x):
            return super().forward(x)[..., [-1]]

    assert len(oftfx.plan(Last(), SPEC, torch.randn(2, 8)).sites) == 3


def test_tensors_made_on_the_default_device_can_be_traced():
    class Makes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(x + torch.arange(8)) * torch.ones(8)

    assert fqns(oftfx.plan(Makes(), SPEC, torch.randn(2, 8))) == ["fc"]


# --- what cannot be traced ---


SOURCE = """
from torch import nn

class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        y = self.fc(x)
        {line}
        return y
"""


def user_module(path, line: str) -> nn.Module:
    """A module in a file of its own, as a user's code would be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SOURCE.format(line=line))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Untraceable()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("raise ValueError('no such head')", "no such head"),
        ("y = y @ x.new_zeros(3, 3)", ""),
        ("y = y if y.sum().item() > 0 else -y", "item"),
        ("y = nothing_of_this_name(y)", "nothing_of_this_name"),
    ],
)
def test_an_untraceable_model_names_the_users_line(tmp_path, line, told):
    model = user_module(tmp_path / "user_model.py", line)
    with pytest.raises(CaptureError) as caught:
        oftfx.plan(model, SPEC, torch.randn(2, 8))
    message = str(caught.value)
    number = SOURCE.format(line="HERE").split("\n").index("        HERE") + 1
    assert f"{tmp_path / 'user_model.py'}:{number}" in message
    assert told in message
    assert "Untraceable" in message
    assert 'capture="modules"' in message


@pytest.mark.parametrize("folder", ["oftfx", "torch"])
def test_a_users_folder_may_have_our_name(tmp_path, folder):
    """A clone of this repository, say: what is foreign is the package, not its name."""
    model = user_module(tmp_path / folder / "mine.py", "raise ValueError('no')")
    with pytest.raises(CaptureError, match=r"mine\.py:11"):
        oftfx.plan(model, SPEC, torch.randn(2, 8))


def test_an_untraceable_model_can_be_planned_by_its_module_tree(tmp_path):
    model = user_module(tmp_path / "user_model.py", "y = y if y.sum().item() > 0 else -y")
    plan = oftfx.plan(model, SPEC, capture="modules")
    assert fqns(plan) == ["fc"]
    assert plan.capture == "modules"
    assert "module tree" in str(plan)
    assert oftfx.Plan.from_json(plan.to_json()) == plan
    oftfx.adapt(model, plan)
    assert len(oftfx.parameters(model)) == 1


def test_the_module_tree_knows_no_shared_inputs():
    with pytest.raises(oftfx.PlanError, match="share_inputs"):
        oftfx.plan(Block(), OFT(block_size=4, share_inputs=True), capture="modules")


def test_the_module_tree_of_a_program_does_not_exist():
    program = torch.export.export(nn.Linear(8, 8), (torch.randn(2, 8),))
    with pytest.raises(oftfx.PlanError, match="ExportedProgram"):
        oftfx.plan(program, SPEC, capture="modules")


def test_a_model_that_cannot_be_copied_says_so():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.stream = (i for i in range(3))

        def forward(self, x):
            return self.fc(x)

    with pytest.raises(CaptureError, match=r"Holder cannot be copied.*generator"):
        oftfx.plan(Holder(), SPEC, torch.randn(2, 8))
    assert fqns(oftfx.plan(Holder(), SPEC, capture="modules")) == ["fc"]


def test_switched_off_compilation_says_so():
    with torch.compiler.set_stance("force_eager"), pytest.raises(CaptureError, match="stance"):
        oftfx.plan(Block(), SPEC, torch.randn(2, 8))


def test_missing_inputs_ask_for_them():
    with pytest.raises(CaptureError, match="example_inputs"):
        oftfx.plan(Block(), SPEC)


def test_a_failed_capture_leaves_the_model_untouched(tmp_path):
    model = user_module(tmp_path / "user_model.py", "raise ValueError('no')")
    before, state = set(vars(model)), copy.deepcopy(model.state_dict())
    with pytest.raises(CaptureError):
        oftfx.adapt(model, SPEC, example_inputs=torch.randn(2, 8))
    assert set(vars(model)) == before
    assert list(model.state_dict()) == list(state)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert type(model.fc) is nn.Linear


def test_planning_is_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oftfx.plan(Layers(), SPEC, torch.randn(2, 8))


# --- graphs taken as they are ---


def test_a_graph_module_is_its_own_capture():
    traced = fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    code = traced.code
    found = capture(traced)
    assert found.graphs == [traced]
    assert fqns(oftfx.plan(traced, SPEC)) == ["0", "2"]
    assert traced.code == code


def test_a_program_is_not_changed_by_planning():
    program = torch.export.export(Block().eval(), (torch.randn(2, 8),))
    before = str(program)
    oftfx.plan(program, SPEC)
    assert str(program) == before


def test_signature_takes_inputs_beside_the_spec():
    assert list(inspect.signature(oftfx.plan).parameters) == [
        "model",
        "spec",
        "example_inputs",
        "capture",
    ]


def test_inputs_that_do_not_fit_are_told_with_the_reason():
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(
        CaptureError, match=r"fake tensor call: RuntimeError\(.*\[3, 9\] X \[8, 4\]"
    ):
        oftfx.plan(model, SPEC, torch.randn(3, 9))
