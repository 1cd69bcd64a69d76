"""The command as a user meets it: help, messages, exit codes, files."""

import json
import shutil
import sys

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from oftfx import OFT, Spec, adapt, cli, errors, save
from oftfx.train import errors as train_errors
from oftfx.train.measure import Change, Estimate
from oftfx.train.output import MARKER
from oftfx.train.report import Curves, Reload, Report, SiteHealth
from tests.small import llama, tokens


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A one-layer GPT-2 (its layers are Conv1D) that reads single letters."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 27}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=26, eos_token_id=26))
    model.save_pretrained(path, max_shard_size="20KB")
    assert len([*path.glob("model-*.safetensors")]) > 1  # in parts, as large models come
    letters = {letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz.")}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="."))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=".").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz" * 20)
    return path


@pytest.fixture
def oftfx(monkeypatch, capsys):
    """Runs a command line; returns its exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["oftfx", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    "command", [[], ["finetune"], ["plan"], ["explain"], ["merge"], ["export"]]
)
def test_help_teaches(oftfx, command):
    code, out, _ = oftfx(*command, "--help")
    assert code == 0
    assert "Usage" in out
    if command:
        assert f"oftfx {command[0]} " in out.partition("Example")[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["finetune"],
        ["finetune", "--steps", "many"],
        ["plan"],
        ["plan", "model", "--block-size", "8.5"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_exits_2(oftfx, arguments):
    code, _, err = oftfx(*arguments)
    assert code == 2
    assert "Traceback" not in err


def test_finetune_then_merge(oftfx, model_dir, text_file, tmp_path):
    out = tmp_path / "out"
    arguments = ["finetune", "--model", model_dir, "--data", text_file, "--out", out]
    arguments += ["--block-size", 8, "--steps", 3, "--seq-len", 16, "--lr", 0.01, "--prompt", "abc"]
    code, printed, err = oftfx(*arguments)
    assert code == 0, err
    assert "agrees" in printed
    assert str(out / "merged") in printed
    code, _, err = oftfx(*arguments)
    assert code == 2
    assert "--force" in err

    merge = ["merge", model_dir, out / "adapter", "--out", tmp_path / "merged"]
    code, printed, err = oftfx(*merge, "--shard-size", "20KB")
    assert code == 0, err
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors.index.json", "generation_config.json", "tokenizer.json"} <= files
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    one = AutoModelForCausalLM.from_pretrained(out / "merged").state_dict()
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert MARKER in {path.name for path in (tmp_path / "merged").iterdir()}

    code, table, err = oftfx("explain", model_dir, out / "adapter")
    assert code == 0, err
    assert "transformer.h.0.attn.c_attn" in table
    _, text, _ = oftfx("explain", model_dir, out / "adapter", "--json")
    assert all(site["norm"] > 0 for site in json.loads(text)["sites"])
    page = tmp_path / "new" / "page.html"
    code, table, _ = oftfx("explain", model_dir, out / "adapter", "--html", page)
    assert code == 0
    assert "transformer.h.0.attn.c_attn" in table
    assert page.read_text("utf-8").count("<svg") == 2
    code, _, err = oftfx("explain", model_dir, out / "adapter", "--html", page / "inside")
    assert (code, "cannot be written" in err) == (2, True), err


@pytest.fixture(scope="module")
def adapter(model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    save(adapt(model, OFT(block_size=8, init_std=0.05, targets="c_fc")), path)
    return path


EXPORTS = {
    "hf": "model.safetensors",
    "lora --rank 2": "adapter_model.safetensors",
    "pt2": "model.pt2",
    "pt2 --adapted --cache 8": "model.pt2",
}


@pytest.mark.parametrize("line", EXPORTS)
def test_export_writes_what_others_load(oftfx, model_dir, adapter, tmp_path, line):
    out = tmp_path / "out"
    arguments = ["export", model_dir, adapter, "--out", out, "--format", *line.split()]
    code, printed, err = oftfx(*arguments)
    assert code == 0, err
    assert str(out) in printed
    assert {EXPORTS[line], MARKER} <= {path.name for path in out.iterdir()}
    if line == "hf":
        assert oftfx(*arguments, "--force", "--shard-size", "5 GB")[0] == 2
    if line == "lora --rank 2":
        assert "lost at most" in printed
        assert oftfx(*arguments)[0] == 2
        assert oftfx(*arguments, "--force")[0] == 0


def test_export_writes_what_peft_loads(oftfx, model_dir, adapter, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "model")
    for file in model_dir.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    save(adapt(base, OFT(block_size=8, init_std=0.05)), tmp_path / "adapter")
    out = tmp_path / "out"
    arguments = ["--out", out, "--format", "peft"]
    code, _, err = oftfx("export", tmp_path / "model", tmp_path / "adapter", *arguments)
    assert code == 0, err
    theirs = PeftModel.from_pretrained(llama(), out)
    torch.testing.assert_close(theirs(**tokens()).logits, base(**tokens()).logits)
    code, _, err = oftfx("export", model_dir, adapter, *arguments, "--force")
    assert (code, "is a Conv1D, of which PEFT has no OFT" in err) == (2, True), err


def test_plan_prints_a_table_or_json(oftfx, model_dir):
    code, table, _ = oftfx("plan", model_dir, "--block-size", 8)
    assert code == 0
    assert "transformer.h.0.attn.c_attn" in table
    code, text, _ = oftfx("plan", model_dir, "--block-size", 8, "--targets", "c_fc", "--json")
    assert code == 0
    (site,) = json.loads(text)["sites"]
    assert site["fqn"] == "transformer.h.0.mlp.c_fc"


def test_all_linear_is_the_default_by_name(oftfx, model_dir):
    default, named = (
        oftfx("plan", model_dir, "--block-size", 8, "--json", *targets)
        for targets in ([], ["--targets", "all-linear"])
    )
    assert named == default
    assert named[0] == 0


METHODS = {
    "oft --block-size 8 --order 3 --share-blocks --dropout 0.1": {
        "method": "OFT",
        "block_size": 8,
        "order": 3,
        "share_blocks": True,
        "dropout": 0.1,
    },
    "coft --eps 0.5 --exact": {"method": "COFT", "eps": 0.5, "exact": True},
    "oft --magnitude --unit-rate": {"method": "OFT", "magnitude": True, "unit_rate": True},
    "boft --block-size 8 --factors 3 --guard rescale": {
        "method": "BOFT",
        "block_size": 8,
        "factors": 3,
        "guard": "rescale",
    },
    "goft --scale": {"method": "GOFT", "scale": True},
    "qgoft --weight 0.1": {"method": "QGOFT", "weight": 0.1},
    "hra --rank 4 --weight 0": {"method": "HRA", "rank": 4, "weight": 0.0},
    "psoft --rank 6 --strict": {"method": "PSOFT", "rank": 6, "relaxed": False},
    "loft --rank 6 --support random --core free --order 2": {
        "method": "LOFT",
        "rank": 6,
        "support": "random",
        "core": "free",
        "order": 2,
    },
}


@pytest.mark.parametrize("line", METHODS)
def test_every_method_has_its_options(oftfx, model_dir, line):
    code, text, err = oftfx("plan", model_dir, "--json", "--method", *line.split())
    assert code == 0, err
    assert Spec.from_json(json.loads(text)["spec"]) == Spec.from_json(METHODS[line])


@pytest.mark.parametrize(
    "method",
    [
        "psoft",
        "loft",
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in ("coft", "boft", "goft", "qgoft", "hra")
        ),
    ],
)
def test_every_method_finetunes(oftfx, model_dir, text_file, tmp_path, method, request):
    out = tmp_path / "out"
    arguments = ["finetune", "--model", model_dir, "--data", text_file, "--out", out]
    arguments += ["--method", method, "--steps", 2, "--seq-len", 16, "--lr", 0.01]
    if method == "boft":
        arguments += ["--block-size", 8]
    if method in ("psoft", "loft"):
        arguments += ["--rank", 4]
    slow = request.node.get_closest_marker("slow") is not None
    code, printed, err = oftfx(*arguments, "--merge" if slow else "--no-merge")
    assert code == 0, err
    assert "agrees" in printed or not slow


def test_an_interrupt_is_told_and_has_its_exit_code(
    oftfx, model_dir, text_file, tmp_path, monkeypatch
):
    def run(job, console):
        raise KeyboardInterrupt

    monkeypatch.setattr("oftfx.train.run", run)
    arguments = ["finetune", "--model", model_dir, "--data", text_file, "--out", tmp_path / "out"]
    for options in ([], ["--checkpoint-every", 10]):  # before the first is begun
        code, printed, _ = oftfx(*arguments, *options)
        assert code == 130
        assert "Nothing was written" in printed
    (tmp_path / "out.checkpoints").mkdir()
    code, printed, _ = oftfx(*arguments, "--checkpoint-every", 10)
    assert code == 130
    assert "--resume" in printed


def test_a_merged_model_that_disagrees_is_told_and_has_its_exit_code(oftfx, monkeypatch):
    loss = Change(*(Estimate(mean, 0.1) for mean in (2.0, 1.0, -1.0)))
    report = Report(
        version="0",
        job={},
        parameters=10,
        trainable=1,
        tokens=1,
        seconds=1.0,
        task=loss,
        unrelated=None,
        samples=None,
        sites=[SiteHealth("fc", 0.1, 0.2, 1e-9)],
        reload=Reload(max_difference=0.2, scale=1.0, same_top=0.5, tolerance=0.1),
        curves=Curves(),
    )
    monkeypatch.setattr("oftfx.train.run", lambda job, console: report)
    code, printed, _ = oftfx("finetune", "--model", "org/name", "--data", "org/rows")
    assert code == 1
    assert "DISAGREES" in printed


ERRORS = [
    error
    for module in (errors, train_errors)
    for error in vars(module).values()
    if isinstance(error, type) and issubclass(error, errors.OftfxError)
]


@pytest.mark.parametrize("error", dict.fromkeys(ERRORS), ids=lambda error: error.__name__)
def test_every_error_of_ours_is_one_message(oftfx, monkeypatch, error):
    def run(job, console):
        raise error("at line 3 [of] yours")

    monkeypatch.setattr("oftfx.train.run", run)
    code, _, err = oftfx("finetune", "--model", "org/name", "--data", "org/rows")
    assert (code, err.strip()) == (2, "error: at line 3 [of] yours")


FINETUNE = "finetune --model {model} --seq-len 16 --steps 1 --block-size 8"
BAD_LINES = {
    f"{FINETUNE} --data nowhere.txt": "nowhere.txt does not exist",
    f"{FINETUNE} --data {{tmp}}/empty.txt": "empty.txt is empty",
    f"{FINETUNE} --data {{tmp}}/binary.txt": "NUL byte",
    f"{FINETUNE} --data {{tmp}}/rows.jsonl": "its fields: 'prompt'",
    f"{FINETUNE} --data {{text}} --unrelated {{tmp}}/empty.txt": "empty.txt is empty",
    f"{FINETUNE} --data {{text}} --seq-len 400": "a smaller seq_len",
    f"{FINETUNE} --data {{text}} --held-out 1.5": "held_out=1.5",
    f"{FINETUNE} --data {{text}} --block-size 7 --checkpoint-every 1": "block_size=7",
    f"{FINETUNE} --data {{text}} --steps 0": "steps=0",
    f"{FINETUNE} --data {{text}} --order 0": "order=0",
    f"{FINETUNE} --data {{text}} --block-size 7": "block_size=7",
    f"{FINETUNE} --data {{text}} --block-size -8": "block_size=-8",
    f"{FINETUNE} --data {{text}} --targets c_fx": "c_fc",
    f"{FINETUNE} --data {{text}} --rank 4": "--rank is no option of --method oft",
    f"{FINETUNE} --data {{text}} --method goft": "--block-size is no option of --method goft",
    f"{FINETUNE} --data {{text}} --method boft --factors 9": "at most factors=3",
    f"{FINETUNE} --data {{text}} --dropout 1": "dropout=1.0",
    "finetune --model {model} --data {text} --seq-len 16 --method hra --rank 3": "rank=3",
    "finetune --model {tmp} --data {text}": "has no config.json",
    "finetune --model {text} --data {text}": "not a GGUF file",
    "merge {model} no-adapter": "no-adapter",
    "merge {model} {tmp}": "{tmp}",
    "export {model} {tmp} --format pt2": "{tmp}",
    "export {model} {tmp} --format peft --rank 2": "--rank is no option of --format peft",
    "export {model} {tmp} --format hf --adapted": "--adapted is no option of --format hf",
    "export {model} {tmp} --format peft --cache 8": "--cache is no option of --format peft",
    "export {model} {tmp} --format pt2 --shard-size 5GB": "--shard-size is no option of --format",
    f"{FINETUNE} --data {{text}} --checkpoint-every 0": "checkpoint_every=0",
    f"{FINETUNE} --data {{text}} --resume": "holds nothing to resume",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_input_is_one_message_and_leaves_nothing(oftfx, model_dir, text_file, tmp_path, line):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}')
    before = sorted(tmp_path.iterdir())
    places = {"model": model_dir, "text": text_file, "tmp": tmp_path}
    arguments = [part.format(**places) for part in line.split()]
    code, _, err = oftfx(*arguments, "--out", tmp_path / "out")
    assert code == 2
    assert "error: " in err
    assert BAD_LINES[line].format(**places) in err
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before


def test_out_that_is_not_ours_is_refused(oftfx, model_dir, text_file, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    line = FINETUNE.format(model=model_dir).split()
    code, _, err = oftfx(*line, "--data", text_file, "--out", tmp_path, "--force")
    assert code == 2
    assert "not written by oftfx" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
