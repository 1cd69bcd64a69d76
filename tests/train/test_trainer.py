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


def make_trainer(model, blocks, path, steps=4, batch=2, eval_dataset=None, **options):
    arguments = TrainingArguments(
        output_dir=path,
        max_steps=steps,
        per_device_train_batch_size=batch,
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


def test_a_trainer_that_knows_nothing_of_oftfx_resumes(model, blocks, tmp_path):
    twin = copy.deepcopy(model)
    oftfx.adapt(model, SPEC)
    make_trainer(model, blocks, tmp_path, steps=2, save_steps=1).train()

    oftfx.adapt(twin, SPEC)
    resumed = make_trainer(twin, blocks, tmp_path / "again", steps=2, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2
    assert all(map(torch.equal, rotations(model), rotations(twin)))


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_resuming_continues_the_curve_bit_for_bit(model, blocks, tmp_path):
    """Stopped in the middle and resumed, from checkpoints that hold the adapter alone.

    With what a real run has: accumulation, blocks dropped at random, a schedule, evaluation, only
    so many checkpoints kept, the best of them loaded at the end, early stopping.
    """
    base, twin = copy.deepcopy(model), copy.deepcopy(model)
    spec = oftfx.OFT(block_size=16, dropout=0.2)

    def make(model, path):
        trainer = make_trainer(
            oftfx.adapt(model, spec),
            blocks,
            path,
            steps=6,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            save_steps=1,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            eval_dataset=blocks.select(range(2)),
        )
        trainer.add_callback(EarlyStoppingCallback(5))
        watch(trainer)
        return trainer

    whole = make(model, tmp_path / "whole")
    whole.train()

    stopped = make(twin, tmp_path / "parts")
    stopped.add_callback(StopAfter(3))
    stopped.train()
    assert stopped.state.global_step == 3
    resumed = make(copy.deepcopy(base), tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)  # the newest

    for key in ("loss", "eval_loss", "learning_rate", "oft_angle"):
        assert logged(resumed, key) == logged(whole, key)
    assert logged(whole, "eval_loss")[0] != logged(whole, "eval_loss")[-1]
    assert resumed.state.best_metric == whole.state.best_metric
    assert all(map(torch.equal, rotations(resumed.model), rotations(model)))

    kept = [*(tmp_path / "parts").glob("checkpoint-*")]
    assert 1 <= len(kept) <= 2
    best = oftfx.load(base, whole.state.best_model_checkpoint)
    assert all(map(torch.equal, rotations(best), rotations(model)))


class StopAfter(TrainerCallback):
    """What a Ctrl-C right after a checkpoint leaves."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.steps


def test_a_checkpoint_is_as_small_as_the_adapter(model, blocks, tmp_path):
    oftfx.adapt(model, SPEC)
    trainer = make_trainer(model, blocks, tmp_path, steps=1, save_steps=1)
    watch(trainer)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    (weights,) = checkpoint.glob("*.safetensors")
    assert weights.name == "adapter.safetensors"
    assert not (checkpoint / "config.json").exists()
    trained = sum(p.numel() * p.element_size() for p in oftfx.parameters(model))
    assert trained <= weights.stat().st_size < trained + 8192  # their names
    # Beside them AdamW's two moments and the Trainer's notes: nothing of the base.
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 3 * trained + 2**16


def test_accumulated_gradients_are_those_of_one_batch(model, blocks, tmp_path):
    twin = copy.deepcopy(model)
    for trained, size, accumulated in ((model, 4, 1), (twin, 1, 4)):
        oftfx.adapt(trained, SPEC)
        options = {"batch": size, "gradient_accumulation_steps": accumulated}
        # Plain descent: Adam makes a step of a rounding error where a gradient is almost zero.
        trainer = make_trainer(
            trained, blocks, tmp_path, steps=2, optim="sgd", save_strategy="no", **options
        )
        watch(trainer)
        trainer.train()
    for one, other in zip(rotations(model), rotations(twin), strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_each_group_has_its_learning_rate(model, blocks, tmp_path):
    """An optimizer of the user's own; parameters have the names of the layers that they turn."""
    oftfx.adapt(model, SPEC)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if "self_attn" in name], "lr": 0.02},
        {"params": [p for name, p in named if "mlp" in name], "lr": 0.0},
    ]
    assert sum(len(group["params"]) for group in groups) == len(oftfx.parameters(model))
    trainer = make_trainer(model, blocks, tmp_path, steps=1, save_strategy="no")
    trainer.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    watch(trainer)
    trainer.train()
    for name, parameter in named:
        assert bool(parameter.any()) == ("self_attn" in name)


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
    losses, penalties = {}, {}
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
            penalties[weight, accumulated] = trainer.state.log_history[0].get("oft_penalty")
            losses[weight, "evaluated"] = trainer.evaluate(blocks)["eval_loss"]
    for accumulated in (1, 4):
        added = losses[0.5, accumulated] - losses[0.0, accumulated]
        assert added == pytest.approx(expected, rel=1e-4)
        assert penalties[0.5, accumulated] == pytest.approx(expected, rel=1e-5)
        assert penalties[0.0, accumulated] is None
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
