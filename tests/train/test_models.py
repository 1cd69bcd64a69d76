import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import oftfx
from oftfx.train import models
from oftfx.train.errors import ModelError

from .conftest import make_model, make_tokenizer

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """The tiny model as llama.cpp would store it: 8-bit blocks, tokenizer inside."""
    model, tokenizer = make_model(), make_tokenizer()
    config = model.config
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(config.vocab_size)))
    writer.add_token_types([3] + [1] * (config.vocab_size - 1))
    writer.add_token_merges(["t h", "a n"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy().astype(np.float32)
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            stem = f"blk.{layer}.{GGUF_NAMES[rest]}"
        else:
            stem = {
                "model.embed_tokens": "token_embd",
                "model.norm": "output_norm",
                "lm_head": "output",
            }[stem]
        if array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{stem}.weight", gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{stem}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_directory(model_dir):
    model, tokenizer = models.load(str(model_dir))
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert tokenizer.decode(tokenizer("a tale")["input_ids"]) == "a tale"


def test_an_id_of_the_hub_is_transformers_to_find(model_dir, monkeypatch):
    asked = []

    def found(load):
        def from_pretrained(source, *args, **options):
            asked.append(source)
            return load({"org/name": model_dir}[source], *args, **options)

        return from_pretrained

    for kind in (AutoTokenizer, AutoModelForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", found(kind.from_pretrained))
    model, _ = models.load("org/name")
    assert isinstance(model, LlamaForCausalLM)
    assert asked == ["org/name", "org/name"]
    with pytest.raises(ModelError, match="org/none cannot be loaded"):
        models.load("org/none")


def test_dtype(model_dir):
    assert models.load(str(model_dir), "bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="int8"):
        models.load(str(model_dir), "int8")


def test_gguf_becomes_an_ordinary_float_model(gguf_file, tmp_path):
    model, tokenizer = models.load(str(gguf_file))
    assert model.dtype == torch.float32
    # Q8_0 keeps 8 bits of every weight. q and k are stored permuted, so o is compared.
    torch.testing.assert_close(
        model.model.layers[1].self_attn.o_proj.weight,
        make_model().model.layers[1].self_attn.o_proj.weight,
        atol=0.005,
        rtol=0,
    )
    # Labelled as quantized, it would be refused here and by the Trainer.
    assert getattr(model, "hf_quantizer", None) is None
    assert not model.is_quantized
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(again.config, "quantization_config")
    ids = torch.tensor([tokenizer("abc")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_in_four_bits_whatever_it_is_stored_in(model_dir, gguf_file):
    ids = torch.arange(20)[None]
    for source in (str(model_dir), str(gguf_file)):
        floats = models.load(source).model
        model = models.load(source, quant="nf4").model
        assert not model.training
        assert type(model.lm_head) is torch.nn.Linear
        kinds = {site.kind for site in oftfx.plan(model, oftfx.OFT(block_size=8)).sites}
        assert kinds == {"linear4bit"}
        assert model.model.layers[0].mlp.up_proj.compute_dtype is floats.dtype
        assert model.config.quantization_config.bnb_4bit_quant_type == "nf4"
        assert model.generation_config.eos_token_id == floats.generation_config.eos_token_id
        assert model.num_parameters() == floats.num_parameters()
        with torch.no_grad():
            got, expected = model(ids).logits, floats(ids).logits
        assert 0 < (got - expected).norm() < 0.5 * expected.norm()
    half = models.load(str(model_dir), "bfloat16", "nf4").model
    assert half.model.layers[0].mlp.up_proj.compute_dtype is half.dtype is torch.bfloat16


def test_a_directory_that_is_quantised_already(model_dir, tmp_path):
    model, tokenizer = models.load(str(model_dir), quant="nf4")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = models.load(str(tmp_path)).model
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ModelError, match="quantised already; load it as it is"):
        models.load(str(tmp_path), quant="nf4")
    with pytest.raises(ModelError, match="quant 'int3' is not one of none, nf4"):
        models.load(str(model_dir), quant="int3")


def test_skeleton_has_shapes_and_no_memory(model_dir, gguf_file):
    for source in (model_dir, gguf_file):
        model = models.load_skeleton(str(source))
        assert model.model.layers[0].mlp.down_proj.weight.shape == (64, 128)
        assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("source", ["./nowhere", "/no/where", "nowhere.gguf", "a/b/c"])
def test_missing(source):
    for load in (models.load, models.load_skeleton):
        with pytest.raises(ModelError, match="does not exist"):
            load(source)


def test_directory_that_is_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json\."):
        models.load(str(tmp_path))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"it holds notes\.txt"):
        models.load(str(tmp_path))
    (tmp_path / "tiny.gguf").write_text("")
    with pytest.raises(ModelError, match=r"name the file: .*tiny\.gguf"):
        models.load(str(tmp_path))


def test_directory_of_a_finished_job(tmp_path, model_dir):
    (tmp_path / "merged").symlink_to(model_dir)
    with pytest.raises(ModelError, match=r"name it: .*merged"):
        models.load(str(tmp_path))


def test_file_that_is_no_gguf(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_text("not a model")
    with pytest.raises(ModelError, match="not a GGUF file"):
        models.load(str(path))


def test_damaged_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        models.load(str(tmp_path))
