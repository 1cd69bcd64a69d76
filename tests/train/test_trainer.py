"""transformers' own Trainer on an adapted model, as a user would run it."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import oftfx
from oftfx.checkpoint import restore
from oftfx.train import HealthCallback, reference, watch
from oftfx.train.data import collate

SPEC = oftfx.OFT(block_size=16)


@pytest.fixture
def blocks():
    torch.manual_seed(1)
    return Dataset.from_dict({"input_ids": torch.randint(258, (16, 32)).tolist()}).with_format(
        "torch"
    )


def make_trainer(model, blocks, path, steps=4, eval_dataset=None, **options):
    arguments = TrainingArguments(
        output_dir=path,
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **options,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=blocks,
        eval_dataset=eval_dataset,
        data_collator=collate,
    )


def rotations(model):
    return [parameter.detach().clone() for parameter in oftfx.parameters(model)]


def test_only_rotations_learn(model, blocks, tmp_path):
    oftfx.adapt(model, SPEC)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = rotations(model)
    trainer = make_trainer(model, blocks, tmp_path, save_strategy="no")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert not any(map(torch.equal, before, rotations(model)))
    for name, parameter in model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name


def test_resuming_continues_where_it_stopped(model, blocks, tmp_path):
    twin = copy.deepcopy(model)
    oftfx.adapt(model, SPEC)
    make_trainer(model, blocks, tmp_path, save_steps=2).train()

    oftfx.adapt(twin, SPEC)
    resumed = make_trainer(twin, blocks, tmp_path / "again", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for one, other in zip(rotations(model), rotations(twin), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def logged_losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_watched_trainer_resumes_bit_for_bit(model, blocks, tmp_path, accumulated):
    """From a checkpoint that is an adapter directory."""
    base, twin = copy.deepcopy(model), copy.deepcopy(model)
    options = {"gradient_accumulation_steps": accumulated}
    oftfx.adapt(model, SPEC)
    trainer = make_trainer(model, blocks, tmp_path, steps=6, save_steps=3, **options)
    watch(trainer)
    trainer.train()

    checkpoint = tmp_path / "checkpoint-3"
    assert {path.name for path in checkpoint.glob("*.safetensors")} == {"adapter.safetensors"}
    assert not (checkpoint / "config.json").exists()
    oftfx.adapt(twin, SPEC)
    resumed = make_trainer(twin, blocks, tmp_path / "again", 6, save_strategy="no", **options)
    watch(resumed)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged_losses(resumed) == logged_losses(trainer)
    assert all(map(torch.equal, rotations(model), rotations(twin)))
    last = oftfx.load(base, tmp_path / "checkpoint-6")
    assert all(map(torch.equal, rotations(model), rotations(last)))


def test_what_is_trained_besides_is_in_the_checkpoint(model, blocks, tmp_path):
    oftfx.adapt(model, SPEC)
    model.model.norm.requires_grad_(True)
    trainer = make_trainer(model, blocks, tmp_path, steps=1, save_steps=1)
    watch(trainer)
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


def test_a_checkpoint_holds_the_one_of_several_that_is_in_use(model, blocks, tmp_path):
    base = copy.deepcopy(model)
    for name in ("kept", "trained"):
        oftfx.adapt(model, SPEC, name)
    oftfx.use(model, "trained")
    trainer = make_trainer(model, blocks, tmp_path, steps=1, save_steps=1)
    watch(trainer)
    trainer.train()
    assert not any(value.any() for value in oftfx.parameters(model, "kept"))
    last = oftfx.load(base, tmp_path / "checkpoint-1")
    assert all(map(torch.equal, rotations(model), rotations(last)))


def test_a_checkpoint_of_another_spec_is_refused(model, blocks, tmp_path):
    twin = copy.deepcopy(model)
    oftfx.save(oftfx.adapt(model, SPEC), tmp_path)
    oftfx.adapt(twin, oftfx.OFT(block_size=8))
    before = rotations(twin)
    with pytest.raises(oftfx.CheckpointError, match="another adapter"):
        restore(twin, tmp_path)
    assert all(map(torch.equal, before, rotations(twin)))


def test_early_stopping_brings_back_the_best(model, blocks, tmp_path):
    oftfx.adapt(model, SPEC)
    trainer = make_trainer(
        model,
        blocks,
        tmp_path,
        steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        eval_dataset=blocks.select(range(2)),
    )
    trainer.args.learning_rate = 1.0  # so that it soon grows worse
    trainer.add_callback(EarlyStoppingCallback(1))
    watch(trainer)
    trainer.train()
    assert trainer.state.global_step < 6
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_the_reference_is_the_base_whatever_was_learned(model):
    ids = torch.arange(12).view(2, 6)
    expected = model(ids).logits
    oftfx.adapt(model, oftfx.OFT(block_size=16, init_std=0.1))
    other = reference(model)
    tuned = model(ids).logits
    assert torch.equal(other(ids).logits, expected)
    assert not torch.equal(tuned, expected)
    assert torch.equal(model(ids).logits, tuned)
    with pytest.raises(oftfx.PlanError, match="no adapter"):
        reference(oftfx.remove(model))


def test_health_is_logged(model, blocks, tmp_path):
    oftfx.adapt(model, SPEC)
    trainer = make_trainer(model, blocks, tmp_path, save_strategy="no")
    trainer.add_callback(HealthCallback())
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    for entry in logged:
        assert 0 < entry["oft_norm"] < 1
        assert 0 < entry["oft_angle"] < 1.6
        assert 0 <= entry["oft_orthogonality_error"] < 1e-3
    assert logged[0]["oft_norm"] < logged[-1]["oft_norm"]


def test_reporters_see_health(model, blocks, tmp_path):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs)

    oftfx.adapt(model, SPEC)
    trainer = make_trainer(model, blocks, tmp_path, steps=1, save_strategy="no")
    trainer.add_callback(Reporter())
    watch(trainer)
    trainer.train()
    assert "oft_norm" in seen[0]


def test_leaving_the_disc_warns_once_a_site(model, blocks, tmp_path):
    oftfx.adapt(model, oftfx.OFT(block_size=16, targets="model.layers.0.self_attn.q_proj"))
    trainer = make_trainer(model, blocks, tmp_path, steps=3, save_strategy="no")
    trainer.add_callback(HealthCallback())
    with torch.no_grad():
        for parameter in oftfx.parameters(model):
            parameter.fill_(1.0)
    with pytest.warns(oftfx.errors.OftfxWarning) as caught:
        trainer.train()
    messages = [str(w.message) for w in caught if issubclass(w.category, oftfx.errors.OftfxWarning)]
    assert len(messages) == 1
    assert "model.layers.0.self_attn.q_proj" in messages[0]


def test_the_regulariser_reaches_the_loss(model, blocks, tmp_path):
    """However many micro-batches a step is made of, it counts once; evaluation is without it."""
    twin = copy.deepcopy(model)
    losses = {}
    for weight, trained in ((0.0, model), (0.5, twin)):
        oftfx.adapt(trained, oftfx.HRA(rank=4, weight=weight))
        expected = oftfx.penalty(trained).item()
        for accumulated in (1, 4):
            options = {"gradient_accumulation_steps": accumulated, "save_strategy": "no"}
            trainer = make_trainer(trained, blocks, tmp_path, steps=1, **options)
            trainer.args.learning_rate = 0.0
            watch(trainer)
            trainer.train()
            losses[weight, accumulated] = trainer.state.log_history[0]["loss"]
            losses[weight, "evaluated"] = trainer.evaluate(blocks)["eval_loss"]
    for accumulated in (1, 4):
        added = losses[0.5, accumulated] - losses[0.0, accumulated]
        assert added == pytest.approx(expected, rel=1e-4)
    assert losses[0.5, "evaluated"] == pytest.approx(losses[0.0, "evaluated"], rel=1e-6)


def test_the_regulariser_is_trained_away(model, blocks, tmp_path):
    oftfx.adapt(model, oftfx.QGOFT(weight=10.0, init_std=0.03))
    before = oftfx.penalty(model).item()
    trainer = make_trainer(model, blocks, tmp_path, steps=8, save_strategy="no")
    watch(trainer)
    trainer.train()
    assert oftfx.penalty(model).item() < before / 2


def test_coft_stays_in_its_ball(model, blocks, tmp_path):
    spec = oftfx.COFT(block_size=16, eps=0.02)
    oftfx.adapt(model, spec)
    trainer = make_trainer(model, blocks, tmp_path, save_strategy="no")
    watch(trainer)
    trainer.train()
    sizes = torch.cat(
        [2**0.5 * p.detach().norm(dim=-1) * p.shape[0] ** 0.5 for p in oftfx.parameters(model)]
    )
    assert (sizes <= spec.eps * (1 + 1e-5)).all()
    assert (sizes > 0.99 * spec.eps).any()
