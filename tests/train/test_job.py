"""The whole job on a tiny model: it learns, folds, and loads without oftfx."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import oftfx
from oftfx.errors import OftfxError, SpecError
from oftfx.train import DataError, Job, OutputError, run, show, trainer
from oftfx.train.errors import ModelError, TrainingError
from oftfx.train.output import MARKER
from oftfx.train.publish import TOLERANCE
from oftfx.train.report import Curves


@pytest.fixture(scope="module")
def job(tmp_path_factory, model_dir, text_file, other_file):
    return Job(
        model=str(model_dir),
        data=str(text_file),
        unrelated=str(other_file),
        out=tmp_path_factory.mktemp("job") / "out",
        spec=oftfx.OFT(block_size=16),
        steps=12,
        batch_size=4,
        seq_len=32,
        lr=0.02,
        prompt="7 little",
    )


@pytest.fixture(scope="module")
def done(job):
    """One run for all the tests that look at what it left; its report and what it printed."""
    console = Console(file=io.StringIO(), width=120)
    report = run(job, console)
    show(report, job.out, console)
    return report, console.file.getvalue()


def test_it_learns_outside_noise(done):
    change = done[0].task.change
    assert change.mean < -0.1
    assert change.mean + 5 * change.stderr < 0


def test_it_leaves_everything(done, job):
    assert {path.name for path in job.out.iterdir()} == {
        MARKER,
        "adapter",
        "merged",
        "training.png",
    }
    assert [path.name for path in job.out.parent.iterdir()] == ["out"]
    assert (job.out / "training.png").read_bytes().startswith(b"\x89PNG")


def test_the_merged_model_needs_no_oftfx(done, job):
    reload = done[0].reload
    assert reload.agrees
    assert reload.same_top == 1
    files = {path.name for path in (job.out / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files


def test_adapter_and_merged_model_say_the_same(done, job, model):
    tokenizer = AutoTokenizer.from_pretrained(job.out / "merged")
    merged = AutoModelForCausalLM.from_pretrained(job.out / "merged")
    oftfx.load(model, job.out / "adapter")
    batch = tokenizer("7 little boats", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(
            merged(batch["input_ids"]).logits,
            model(batch["input_ids"]).logits,
            rtol=1e-4,
            atol=1e-4,
        )


def test_the_report_is_json(done, job):
    stored = json.loads((job.out / MARKER).read_text())
    assert stored["job"]["spec"] == {"method": "OFT", "block_size": 16}
    assert stored["task"]["change"]["mean"] == done[0].task.change.mean
    assert len(stored["curves"]["train"]) == job.steps
    assert [point[0] for point in stored["curves"]["held_out"]] == [0, 3, 6, 9, 12]


def test_what_the_user_sees(done):
    text = done[1]
    parts = ["Training", "12/12", "task, held out", "unrelated text", "trainable parameters"]
    parts += ["worst orthogonality error", "agrees", "before", "after", "7 little", "training.png"]
    assert [part for part in parts if part not in text] == []


def test_the_same_seed_gives_the_same_model(done, job, tmp_path):
    again = dataclasses.replace(job, out=tmp_path / "out", merge=False, prompt=None)
    report = run(again, Console(quiet=True))
    assert report.task == done[0].task
    assert report.reload is None
    assert not (tmp_path / "out" / "merged").exists()


def test_held_out_text_can_be_a_file(job, other_file, tmp_path):
    own = dataclasses.replace(
        job,
        out=tmp_path / "out",
        held_out=str(other_file),
        unrelated=None,
        steps=1,
        merge=False,
        prompt=None,
    )
    assert run(own, Console(quiet=True)).unrelated is None


@pytest.mark.usefixtures("reload_here")
def test_on_a_base_in_four_bits(job, tmp_path):
    quantised = dataclasses.replace(job, out=tmp_path / "out", quant="nf4")
    report = run(quantised, Console(quiet=True))
    assert report.task.change.mean < -0.1
    assert report.reload.agrees
    assert report.reload.tolerance == TOLERANCE[torch.bfloat16]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert merged.dtype is torch.bfloat16
    assert not hasattr(merged.config, "quantization_config")


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize(
    "how",
    [
        {"load_in_4bit": True},
        pytest.param({"load_in_8bit": True}, marks=pytest.mark.slow),
    ],
)
def test_on_a_directory_that_is_quantised_already(job, how, tmp_path):
    base = tmp_path / "base"
    config = BitsAndBytesConfig(**how)
    AutoModelForCausalLM.from_pretrained(job.model, quantization_config=config).save_pretrained(
        base
    )
    AutoTokenizer.from_pretrained(job.model).save_pretrained(base)
    own = dataclasses.replace(
        job, model=str(base), out=tmp_path / "out", dtype="float32", unrelated=None, prompt=None
    )
    report = run(own, Console(quiet=True))
    assert report.task.change.mean < -0.1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert merged.dtype is torch.float32
    if "load_in_4bit" in how:  # int8 rounds its activations besides, which float layers do not
        assert report.reload.agrees


class _Interrupt(trainer._Tracker):
    """Ctrl-C in the third step."""

    def on_log(self, args, state, control, **kwargs):
        super().on_log(args, state, control, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def small(job, tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "out"
    return dataclasses.replace(
        job, out=out, steps=4, merge=False, prompt=None, unrelated=None, checkpoint_every=2
    )


@pytest.fixture(scope="module")
def whole(small):
    """What it reports when nothing stops it."""
    return run(small, Console(quiet=True))


def interrupt(job, monkeypatch):
    with monkeypatch.context() as interrupted:
        interrupted.setattr(trainer, "_Tracker", _Interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(job, Console(quiet=True))


def test_an_interrupted_job_goes_on_as_if_it_had_not_been(small, whole, tmp_path, monkeypatch):
    parts = dataclasses.replace(small, out=tmp_path / "out")
    interrupt(parts, monkeypatch)
    kept = tmp_path / "out.checkpoints"
    assert [path.name for path in tmp_path.iterdir()] == ["out.checkpoints"]
    (kept / "checkpoint-3").mkdir()  # cut off while it was written
    (kept / "checkpoint-3" / "adapter.safetensors").write_bytes(b"")

    with pytest.raises(OutputError, match="holds an earlier run: go on with --resume"):
        run(parts, Console(quiet=True))
    other = dataclasses.replace(parts, resume=True, lr=0.5)
    with pytest.raises(OutputError, match=r"was made with lr=0\.02: resume with the same"):
        run(other, Console(quiet=True))

    resumed = run(
        dataclasses.replace(parts, resume=True, checkpoint_every=None), Console(quiet=True)
    )
    assert resumed.curves == whole.curves
    assert resumed.task == whole.task
    assert resumed.tokens == whole.tokens
    assert not kept.exists()
    with pytest.raises(OutputError, match="holds nothing to resume"):
        run(dataclasses.replace(parts, out=tmp_path / "new", resume=True), Console(quiet=True))


def test_a_job_stopped_after_its_last_step_takes_no_more(small, whole, tmp_path, monkeypatch):
    parts = dataclasses.replace(small, out=tmp_path / "out")
    save = oftfx.save

    def interrupted_at_last(model, path, *args):
        if path.name == "adapter":
            raise KeyboardInterrupt
        save(model, path, *args)

    with monkeypatch.context() as interrupted:
        interrupted.setattr("oftfx.save", interrupted_at_last)
        with pytest.raises(KeyboardInterrupt):
            run(parts, Console(quiet=True))
    assert (tmp_path / "out.checkpoints" / "checkpoint-4").is_dir()
    resumed = run(dataclasses.replace(parts, resume=True), Console(quiet=True))
    assert resumed.curves == whole.curves
    assert resumed.task == whole.task
    assert (resumed.tokens, resumed.sites) == (whole.tokens, whole.sites)
    assert resumed.seconds > 0


def test_seconds_are_those_of_all_processes(small, tmp_path, monkeypatch):
    parts = dataclasses.replace(small, out=tmp_path / "out")
    interrupt(parts, monkeypatch)
    state = tmp_path / "out.checkpoints" / "checkpoint-2" / "trainer_state.json"
    stored = json.loads(state.read_text())
    stored["log_history"][-1]["seconds"] += 1000
    state.write_text(json.dumps(stored))
    resumed = run(dataclasses.replace(parts, resume=True), Console(quiet=True))
    assert 1000 < resumed.seconds < 1100


def test_tokens_are_those_that_were_trained_on(small, text_file, tmp_path):
    """Three blocks make one batch of two and one of one."""
    text = tmp_path / "three.txt"
    text.write_text(text_file.read_text()[:105])
    own = dataclasses.replace(
        small, out=tmp_path / "out", data=str(text), held_out=str(text_file), batch_size=2
    )
    assert run(own, Console(quiet=True)).tokens == 4 * 3 * 32 // 2


def test_bad_input_leaves_no_checkpoints(small, tmp_path):
    for changes in ({"seq_len": 4096}, {"spec": oftfx.OFT(block_size=7)}):
        with pytest.raises(OftfxError):
            run(dataclasses.replace(small, out=tmp_path / "out", **changes), Console(quiet=True))
        assert list(tmp_path.iterdir()) == []


def test_force_keeps_an_earlier_run_until_the_new_one_trains(small, tmp_path, monkeypatch):
    parts = dataclasses.replace(small, out=tmp_path / "out")
    interrupt(parts, monkeypatch)
    newest = tmp_path / "out.checkpoints" / "checkpoint-2"
    again = dataclasses.replace(parts, force=True)
    with pytest.raises(OftfxError):
        run(dataclasses.replace(again, seq_len=4096), Console(quiet=True))
    assert newest.is_dir()
    run(again, Console(quiet=True))
    assert not newest.exists()


def test_what_cannot_be_resumed(small, text_file, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    parts = dataclasses.replace(small, out=tmp_path / "out", data=str(text))
    interrupt(parts, monkeypatch)
    resumed = dataclasses.replace(parts, resume=True)
    text.write_text(text_file.read_text().replace("boats", "ships"))
    with pytest.raises(OutputError, match=r"text\.txt has changed since .*out\.checkpoints was"):
        run(resumed, Console(quiet=True))
    record = tmp_path / "out.checkpoints" / "job.json"
    for damaged in ('{"model": "', "[]", "{}"):
        record.write_text(damaged)
        with pytest.raises(OutputError, match=r"job\.json is damaged .* begin anew with --force"):
            run(resumed, Console(quiet=True))


def test_a_loss_that_is_no_number_stops_the_job(small, tmp_path):
    """At the step that shows it, or behind the last one."""
    # AdamW moves every parameter by about lr in its first step.
    diverging = dataclasses.replace(small, out=tmp_path / "out", lr=1e30, checkpoint_every=None)
    for steps, when in ((4, "at step 2"), (1, "after training")):
        own = dataclasses.replace(diverging, steps=steps)
        with (
            pytest.warns(oftfx.OftfxWarning),
            pytest.raises(TrainingError, match=rf"The loss is nan {when}: use a lower lr than"),
        ):
            run(own, Console(quiet=True))
        assert list(tmp_path.iterdir()) == []


def test_the_curve_is_the_models_loss_without_the_regulariser(small, tmp_path):
    """Reflections that start in pairs: the more they weigh, the larger the regulariser."""
    light, heavy = (
        dataclasses.replace(
            small, out=tmp_path / f"{weight}", spec=oftfx.HRA(rank=4, weight=weight), steps=1
        )
        for weight in (0.0, 0.5)
    )
    light, heavy = run(light, Console(quiet=True)), run(heavy, Console(quiet=True))
    assert heavy.curves.train[0][1] == pytest.approx(light.curves.train[0][1], rel=1e-5)


def test_one_step_learns(small, tmp_path):
    report = run(dataclasses.replace(small, out=tmp_path / "out", steps=1), Console(quiet=True))
    assert report.task.change.mean != 0


def test_out_may_be_text(job):
    assert dataclasses.replace(job, out="x").out == Path("x")


def test_a_report_is_json_whatever_is_not_finite(done, tmp_path):
    nowhere = dataclasses.replace(done[0].task.change, stderr=float("nan"))
    task = dataclasses.replace(done[0].task, change=nowhere)
    curves = Curves(train=[(1, float("inf"))])
    dataclasses.replace(done[0], task=task, curves=curves).save(tmp_path / MARKER)
    stored = json.loads((tmp_path / MARKER).read_text(), parse_constant=pytest.fail)
    assert stored["task"]["change"]["stderr"] is None
    assert stored["curves"]["train"] == [[1, None]]


def test_held_out_may_ask_for_nearly_all(small, tmp_path):
    most = dataclasses.replace(small, out=tmp_path / "out", held_out=0.99, seq_len=1024, steps=1)
    run(most, Console(quiet=True))


def test_a_token_without_an_embedding_is_told(small, tokenizer, text_file, tmp_path):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(small.model).save_pretrained(base)
    tokenizer.add_tokens(["boats", "ships"])
    tokenizer.save_pretrained(base)
    own = dataclasses.replace(small, model=str(base), out=tmp_path / "out", steps=1)
    with pytest.raises(ModelError, match=r"embeddings for 258 tokens, .* token 258 \('boats'\)"):
        run(own, Console(quiet=True))
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text().replace("boats", "carts"))
    harmless = dataclasses.replace(own, data=str(text))
    run(harmless, Console(quiet=True))
    asked = dataclasses.replace(harmless, out=tmp_path / "asked", prompt="ships")
    with pytest.raises(ModelError, match=r"token 259 \('ships'\)"):
        run(asked, Console(quiet=True))


def test_too_little_text(job, tmp_path):
    for changes in ({"seq_len": 4096}, {"seq_len": 2048, "held_out": 0.5}):
        with pytest.raises(DataError, match="give more text or a smaller seq_len"):
            run(dataclasses.replace(job, out=tmp_path / "out", **changes), Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"seed": -1},
        {"seed": 2**32},
        {"batch_size": 0},
        {"seq_len": 1},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"held_out": 1.0},
        {"eval_tokens": 0},
        {"checkpoint_every": 0},
        {"held_out": 1},
        {"held_out": 0},
        {"held_out": -3},
        {"steps": 2.5},
        {"batch_size": True},
        {"seq_len": "64"},
        {"checkpoint_every": 1.5},
        {"seed": 0.5},
    ],
)
def test_numbers_out_of_range(job, changes):
    (name,) = changes
    with pytest.raises(SpecError, match=name):
        dataclasses.replace(job, **changes)
