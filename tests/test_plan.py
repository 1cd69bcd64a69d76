"""The plan: golden totals on real shapes, every kind of model, targets, and plain data."""

import dataclasses
import json
import re
import time

import pytest
import torch
from torch import fx, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import oftfx
from oftfx import OFT, Plan, PlanError, SpecError

SPEC = OFT(block_size=4)
X = torch.randn(2, 8)


def on_meta(cls, config):
    with torch.device("meta"):
        return cls(config)


def fqns(plan: Plan) -> list[str]:
    return [site.fqn for site in plan.sites]


def reasons(plan: Plan) -> dict[str, str]:
    return {skip.name: skip.reason for skip in plan.skipped}


# --- the paper's parameter counts, on the published shapes ---


def llama2_7b(layers: int = 32):
    return LlamaForCausalLM, LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
    )


def qwen25(hidden: int, intermediate: int, heads: int, kv: int, layers: int, tied: bool = False):
    return Qwen2ForCausalLM, Qwen2Config(
        vocab_size=151936 if tied else 152064,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        tie_word_embeddings=tied,
    )


def bart_large(layers: int = 12):
    return BartForConditionalGeneration, BartConfig(
        vocab_size=50265,
        d_model=1024,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_ffn_dim=4096,
        decoder_ffn_dim=4096,
        encoder_attention_heads=16,
        decoder_attention_heads=16,
    )


# name: (make(layers), layers, b, trainable numbers, the paper's rounded count)
GOLDEN = {
    "Llama-2-7B": (llama2_7b, 32, 32, 17_649_664, "17.65M"),
    "Qwen2.5-1.5B": (lambda n=28: qwen25(1536, 8960, 12, 2, n, True), 28, 32, 7_888_384, "7.89M"),
    "Qwen2.5-7B": (lambda n=28: qwen25(3584, 18944, 28, 4, n), 28, 32, 17_554_432, "17.55M"),
    "Qwen2.5-32B": (lambda n=64: qwen25(5120, 27648, 40, 8, n), 64, 32, 57_901_056, "57.90M"),
    "BART-large": (bart_large, 12, 16, 2_027_520, "2.03M"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_totals(name):
    """One layer of the real shape: all layers are alike, and nothing outside them is adapted."""
    make, layers, b, expected, rounded = GOLDEN[name]
    plan = oftfx.plan(on_meta(*make(1)), OFT(block_size=b))
    assert plan.num_trainable * layers == expected
    assert f"{expected / 1e6:.2f}M" == rounded
    assert len(plan.sites) == (16 if name == "BART-large" else 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_totals_of_whole_models(name):
    make, layers, b, expected, _ = GOLDEN[name]
    plan = oftfx.plan(on_meta(*make()), OFT(block_size=b))
    assert plan.num_trainable == expected
    assert len(plan.sites) == layers * (16 if name == "BART-large" else 7)
    assert all(skip.reason == "output head" or "embedding" in skip.reason for skip in plan.skipped)


def smollm2_135m():
    return LlamaForCausalLM, LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "trainable", "most"), [(smollm2_135m, 2_321_280, 10), (llama2_7b, 17_649_664, 30)]
)
def test_planning_takes_seconds(make, trainable, most):
    """Of this thread's own time, so that nothing beside it on the machine counts."""
    model = on_meta(*make())
    begun = time.thread_time()
    plan = oftfx.plan(model, OFT())
    assert time.thread_time() - begun < most
    assert plan.num_trainable == trainable


# --- transformers models, without example inputs ---

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "num_hidden_layers": 2,
}


def tiny_llama(**fields):
    config = LlamaConfig(**TINY, num_key_value_heads=1, **fields)
    return on_meta(LlamaForCausalLM, config)


LLAMA_LEAVES = {
    *(f"self_attn.{leaf}_proj" for leaf in "qkvo"),
    *(f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")),
}


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model(tied):
    plan = oftfx.plan(tiny_llama(tie_word_embeddings=tied), SPEC)
    layers = {f"model.layers.{i}.{leaf}" for i in range(2) for leaf in LLAMA_LEAVES}
    assert set(fqns(plan)) == layers
    assert all(site.kind == "linear" for site in plan.sites)
    assert reasons(plan)["lm_head"] == "output head"
    leaves = [{name.rpartition(".")[2] for name in group.sites} for group in plan.groups]
    layer = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    assert leaves == layer * 2


def test_a_tied_head_is_adapted_when_named():
    spec = OFT(block_size=4, targets="lm_head")
    (site,) = oftfx.plan(tiny_llama(tie_word_embeddings=True), spec).sites
    assert (site.fqn, site.weight, site.tied) == ("lm_head", "lm_head.weight", True)


def test_an_encoder():
    plan = oftfx.plan(on_meta(BertModel, BertConfig(**TINY)), SPEC)
    assert len(plan.sites) == 2 * 6 + 1
    q = next(group for group in plan.groups if len(group.sites) > 1)
    assert {name.rpartition(".")[2] for name in q.sites} == {"query", "key", "value"}


def test_an_encoder_decoder():
    config = BartConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    plan = oftfx.plan(on_meta(BartForConditionalGeneration, config), SPEC)
    assert len(plan.sites) == 6 + 10
    assert reasons(plan)["lm_head"] == "output head"
    # Cross attention reads the decoder's states for q and the encoder's for k and v.
    cross = [{n.rpartition(".")[2] for n in g.sites if "encoder_attn" in n} for g in plan.groups]
    assert [names for names in cross if names] == [{"q_proj"}, {"k_proj", "v_proj"}, {"out_proj"}]


def test_a_vision_transformer():
    config = ViTConfig(**{**TINY, "image_size": 32, "patch_size": 8})
    plan = oftfx.plan(on_meta(ViTForImageClassification, config), SPEC)
    assert len(plan.sites) == 2 * 6
    assert reasons(plan)["classifier"] == "output head"
    assert "conv2d" in reasons(plan)["vit.embeddings.patch_embeddings.projection"]


def test_whisper():
    config = WhisperConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    plan = oftfx.plan(on_meta(WhisperForConditionalGeneration, config), SPEC)
    assert len(plan.sites) == 6 + 10
    assert reasons(plan)["proj_out"] == "output head"


def test_gpt2s_conv1d():
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=0)
    plan = oftfx.plan(on_meta(GPT2LMHeadModel, config), SPEC)
    shapes = {
        site.fqn.removeprefix("transformer.h.0."): (
            site.kind,
            site.layout,
            site.in_features,
            site.out_features,
        )
        for site in plan.sites
    }
    assert shapes == {
        "attn.c_attn": ("conv1d", "in_out", 16, 48),
        "attn.c_proj": ("conv1d", "in_out", 16, 16),
        "mlp.c_fc": ("conv1d", "in_out", 16, 64),
        "mlp.c_proj": ("conv1d", "in_out", 64, 16),
    }
    assert reasons(plan)["lm_head"] == "output head"


def test_a_mixture_of_experts():
    config = MixtralConfig(
        **{**TINY, "num_hidden_layers": 1}, num_key_value_heads=1, num_local_experts=4
    )
    model = on_meta(MixtralForCausalLM, config)
    plan = oftfx.plan(model, SPEC)
    attention = [f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkvo"]
    assert fqns(plan) == attention
    assert reasons(plan)["model.layers.0.mlp.gate"] == "MoE router"
    assert "no matmul" in reasons(plan)["model.layers.0.mlp.experts.down_proj"]
    named = oftfx.plan(model, OFT(block_size=4, targets="mlp.gate"))
    assert fqns(named) == ["model.layers.0.mlp.gate"]


# --- every kind of model ---


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.w = nn.Parameter(torch.randn(8, 16))
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        h = self.norm(x)
        return self.out((self.q(h) * self.k(h)) @ self.w)


def kinds():
    """One model in every form that can be planned, with inputs where they are needed."""
    model = Net().eval()
    yield "symbolic", fx.symbolic_trace(model), None
    program = torch.export.export(model, (X,))
    yield "exported", program, None
    yield "strict", torch.export.export(model, (X,), strict=True), None
    yield "decomposed", program.run_decompositions(), None
    yield "exported for inference", torch.export.export(model, (X,)).run_decompositions({}), None
    yield "compiled", torch.compile(model), X
    yield "compiled, without inputs in a tuple", torch.compile(model), (X,)


@pytest.mark.parametrize("share", [False, True])
def test_every_kind_of_model_gives_the_same_plan(share):
    spec = OFT(block_size=4, share_inputs=share)
    plain = oftfx.plan(Net().eval(), spec, X)
    assert fqns(plain) == ["q", "k", "w", "out"]
    for kind, model, inputs in kinds():
        assert oftfx.plan(model, spec, inputs) == plain, kind


def test_an_adapted_model_gives_the_plan_of_its_base():
    model = Net().eval()
    plain = oftfx.plan(model, SPEC, X)
    program = torch.export.export(model, (X,))
    for kind, base, inputs in [
        ("symbolic", fx.symbolic_trace(Net().eval()), None),
        ("exported", program, None),
        ("module", model, X),
    ]:
        adapted = oftfx.adapt(base, plain)
        assert oftfx.plan(adapted, SPEC, inputs) == plain, kind


@pytest.mark.parametrize("model", [None, 3, "gpt2", nn.Linear, torch.zeros(2), lambda x: x])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(PlanError, match=r"must be an nn\.Module"):
        oftfx.plan(model, SPEC, X)


@pytest.mark.parametrize("spec", [None, OFT, 32, "OFT", {"block_size": 4}])
def test_what_is_no_spec_is_refused(spec):
    with pytest.raises(SpecError, match="must be a spec"):
        oftfx.plan(Net(), spec, X)


def test_a_model_without_matmuls_has_nothing_to_adapt():
    with pytest.raises(PlanError, match="nothing to adapt"):
        oftfx.plan(nn.Sequential(nn.ReLU(), nn.LayerNorm(8)), SPEC, X)


# --- targets ---


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        block = {"q_proj": 8, "k_proj": 8, "down_proj": 12}
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(8, width) for name, width in block.items()})
            for _ in range(3)
        )
        self.up = nn.Linear(12, 8)

    def forward(self, x):
        for layer in self.layers:
            x = self.up(layer["down_proj"](layer["q_proj"](x) + layer["k_proj"](x)))
        return x


def chosen(**fields) -> list[str]:
    return fqns(oftfx.plan(Stack(), OFT(**{"block_size": 4, **fields}), X))


QS = [f"layers.{i}.q_proj" for i in range(3)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q_proj", QS),
        ("layers.1.q_proj", QS[1:2]),
        (r"layers\.[01]\.q_proj", QS[:2]),
        (re.compile(r".*\.q_proj"), QS),
        (["up", "layers.2.q_proj"], ["up", *QS[2:]]),
        (lambda site: site.out_features == 12, [f"layers.{i}.down_proj" for i in range(3)]),
        (lambda site: site.fqn.startswith("layers.0"), [
            "layers.0.q_proj", "layers.0.k_proj", "layers.0.down_proj"
        ]),
    ],
)  # fmt: skip
def test_targets_are_names_regexes_or_a_function(targets, expected):
    assert sorted(chosen(targets=targets)) == sorted(expected)


def test_exclude_wins():
    assert chosen(targets="q_proj", exclude="layers.0.q_proj") == QS[1:]
    assert "up" not in chosen(exclude="up")
    plan = oftfx.plan(Stack(), OFT(block_size=4, exclude="up"), X)
    assert reasons(plan) == {"up": "excluded"}


@pytest.mark.parametrize(
    ("target", "near"),
    [("q_prj", "q_proj"), ("qproj", "q_proj"), ("layers.7.q_proj", "layers.0.q_proj")],
)
def test_a_target_that_matches_nothing_lists_near_misses(target, near):
    with pytest.raises(PlanError) as caught:
        chosen(targets=["up", target])
    assert repr(target) in str(caught.value)
    assert near in str(caught.value)
    assert "near misses" in str(caught.value)


def test_a_target_like_nothing_lists_what_there_is():
    with pytest.raises(PlanError, match=r"zzz.*it has: down_proj, k_proj, q_proj, up"):
        chosen(targets="zzz")


def test_a_function_that_chooses_nothing_is_an_error():
    with pytest.raises(PlanError, match="nothing to adapt"):
        chosen(targets=lambda site: False)


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["q_proj", "k_proj"], lambda site: True],
    ids=["all", "names", "callable"],
)
def test_an_override_that_matches_nothing_is_an_error(targets):
    with pytest.raises(PlanError, match=r"overrides.*'q_prj'.*q_proj"):
        chosen(targets=targets, overrides={"q_prj": {"order": 2}})


def test_an_exclusion_that_matches_nothing_is_an_error():
    with pytest.raises(PlanError, match=r"exclude.*'q_prj'.*q_proj"):
        chosen(exclude="q_prj")


def test_overrides_change_their_sites_alone():
    spec = OFT(block_size=4, overrides={"up": {"block_size": 6}, "layers.1.q_proj": {"order": 2}})
    plan = oftfx.plan(Stack(), spec, X)
    held = {site.fqn: site for site in plan.sites}
    assert held["up"].num_trainable == 2 * 15
    assert held["layers.0.q_proj"].num_trainable == 2 * 6
    assert plan.spec_of(held["up"]).block_size == 6
    assert plan.spec_of(held["layers.1.q_proj"]).order == 2
    assert plan.spec_of(held["layers.0.q_proj"]).order == 4


def test_shared_inputs_must_agree():
    overrides = {"k_proj": {"order": 2}}
    with pytest.raises(PlanError, match=r"share_inputs: .*k_proj and .*q_proj"):
        chosen(share_inputs=True, overrides=overrides)
    assert chosen(share_inputs=True, overrides={**overrides, "q_proj": {"order": 2}})


def test_a_block_size_that_does_not_divide_names_site_and_divisors():
    with pytest.raises(PlanError) as caught:
        chosen(block_size=8)
    message = str(caught.value)
    assert "up: block_size=8 does not divide its input width 12" in message
    assert "[4, 6, 12]" in message
    assert "exclude" in message
    assert "overrides" in message
    assert chosen(block_size=8, overrides={"up": {"block_size": 6}})
    assert chosen(block_size=8, exclude="up")


# --- plain data ---


@pytest.fixture(scope="module")
def plan() -> Plan:
    spec = OFT(
        block_size=4,
        targets=["q_proj", "up", re.compile(r".*k_proj")],
        exclude="layers.0.k_proj",
        overrides={"up": {"block_size": 6}},
    )
    return oftfx.plan(Stack(), spec, X)


def test_a_plan_round_trips_through_json(plan):
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.to_json() == plan.to_json()
    assert str(again) == str(plan)


def test_a_plan_hashes_by_its_content(plan):
    other = dataclasses.replace(plan, sites=plan.sites[1:])
    assert len({plan, Plan.from_json(plan.to_json()), other}) == 2


def test_a_function_becomes_the_names_it_chose():
    spec = OFT(block_size=4, targets=lambda site: "q_proj" in site.fqn)
    plan = oftfx.plan(Stack(), spec, X)
    again = Plan.from_json(plan.to_json())
    assert again.sites == plan.sites
    assert oftfx.plan(Stack(), again.spec, X).sites == plan.sites


def test_totals_add_up(plan):
    assert plan.num_trainable == sum(site.num_trainable for site in plan.sites)
    assert {name for group in plan.groups for name in group.sites} == set(fqns(plan))
    weights = {n for n, p in Stack().named_parameters() if p.dim() > 1}
    assert {f"{name}.weight" for name in [*fqns(plan), *reasons(plan)]} == weights


def test_seeds_depend_on_the_site_alone(plan):
    assert len({plan.seed_of(site.fqn) for site in plan.sites}) == len(plan.sites)
    alone = oftfx.plan(Stack(), OFT(block_size=4, targets="layers.2.q_proj"), X)
    site = next(site for site in plan.sites if site.fqn == "layers.2.q_proj")
    assert alone.seed_of(alone.sites[0].fqn) == plan.seed_of(site.fqn)
    other = dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, seed=1))
    assert other.seed_of(site.fqn) != plan.seed_of(site.fqn)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '"plan"',
        '{"spec": {"method": "OFT"}}',
        '{"spec": {"method": "OFT"}, "sites": [{}], "skipped": [], "capture": "graph"}',
        '{"spec": [], "sites": [], "skipped": [], "capture": "graph"}',
        '{"spec": {"method": "OFT"}, "sites": 3, "skipped": [], "capture": "graph"}',
        '{"spec": {"method": "ROFT"}, "sites": [], "skipped": [], "capture": "graph"}',
    ],
)
def test_what_is_no_plan_is_refused(text):
    with pytest.raises((PlanError, SpecError)):
        Plan.from_json(text)


def test_a_plan_is_json(plan):
    data = json.loads(plan.to_json())
    assert set(data) == {"spec", "capture", "sites", "skipped", "copied"}
    assert data["capture"] == "graph"


def test_an_unknown_capture_is_refused_and_said_what_there_is():
    with pytest.raises(ValueError, match="capture='tree': must be 'graph' or 'modules'"):
        oftfx.plan(nn.Linear(4, 4), OFT(block_size=2), capture="tree")


class Named(nn.Module):
    """Has a module of the name that rotations are held by."""

    def __init__(self):
        super().__init__()
        self.oft = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.oft(x))


def test_a_module_that_is_called_as_what_holds_rotations_is_one_like_any_other():
    x, spec = torch.randn(3, 8), OFT(block_size=4)
    model = oftfx.adapt(Named(), spec, example_inputs=x)
    assert [site.fqn for site in oftfx.plan(Named(), spec, x).sites] == ["oft.0", "oft.2", "fc"]
    assert len(oftfx.parameters(model)) == 3
    assert [site.fqn for site in oftfx.plan(model, spec, x).sites] == ["oft.0", "oft.2", "fc"]


def test_a_layer_as_wide_as_there_are_positions_is_no_output_head():
    sizes = {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    found = oftfx.plan(GPT2Model(config), OFT(block_size=8))
    assert "h.1.mlp.c_proj" in {site.fqn for site in found.sites}


def test_the_module_tree_leaves_out_what_attention_reads_without_calling_it():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = oftfx.plan(layer, OFT(block_size=4), capture="modules")
    assert {site.fqn for site in found.sites} == {"linear1", "linear2"}
    with pytest.raises(PlanError, match="reads its weight, and never calls it"):
        oftfx.plan(layer, OFT(block_size=4, targets="self_attn.out_proj"), capture="modules")


@pytest.mark.parametrize("verb", [oftfx.parameters, oftfx.health, oftfx.merge, oftfx.remove])
def test_what_is_no_model_is_said_to_be_none(verb):
    with pytest.raises(PlanError, match=r"model is a NoneType: it must be an nn\.Module"):
        verb(None)
