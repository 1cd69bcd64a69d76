"""Checks that a merged model needs no oftfx: a program of its own, run as a file, not imported.

    python reload.py MODEL_DIR PROBE_FILE DTYPE DEVICE

Loads the model with plain transformers, in a process where importing oftfx fails, and prints as
JSON how its logits on the probe's tokens compare with the logits stored beside them.
"""

import json
import sys


def main(model_dir: str, probe_file: str, dtype: str, device: str) -> None:
    """Prints ``max_difference``, ``scale`` (the largest logit) and ``same_top`` (a share)."""
    sys.modules["oftfx"] = None  # type: ignore[assignment]

    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    probe = load_file(probe_file)
    AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to(device)
    logits = model(input_ids=probe["ids"].to(device), use_cache=False).logits.float().cpu()
    expected = probe["logits"]
    result = {
        "max_difference": (logits - expected).abs().max().item(),
        "scale": expected.abs().max().item(),
        "same_top": (logits.argmax(-1) == expected.argmax(-1)).float().mean().item(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
