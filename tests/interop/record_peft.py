"""What versions of PEFT write and compute, recorded for tests that have one version alone.

    PYTHONPATH=<that version of PEFT, and a transformers it imports> \
        python tests/interop/record_peft.py tests/interop/recorded

writes ``recorded/<version>.json``: for each case the two files of the directory, and the logits of
the model it was saved from. 0.16 and 0.17 were run with transformers 4.53.3, the others with the
pinned one, and 0.20 without torchao. All numbers are made by a formula, so that no random generator
has to agree.
"""

import base64
import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

IDS = torch.tensor([[1, 4, 1, 9], [0, 10, 7, 2]])
TARGETS = ["up", "down"]


class Tiny(nn.Module):
    """Layers of two widths between an embedding and a head, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 12)
        self.up = nn.Linear(12, 8)
        self.down = nn.Linear(8, 12)
        self.score = nn.Linear(12, 3)
        for index, parameter in enumerate(self.parameters()):
            parameter.data = wave(parameter, index + 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        return self.score(x + self.down(torch.tanh(self.up(x))))


def wave(like: Tensor, index: int) -> Tensor:
    """Numbers of no pattern that a layer could hide."""
    places = torch.arange(1, like.numel() + 1, dtype=torch.float64)
    return torch.sin(places * (index + 0.7) ** 2).reshape(like.shape).float()


def cases(version: tuple[int, int]) -> dict[str, tuple[str, dict[str, object]]]:
    """The configs that a version has: the class's name, and its fields."""
    oft = {"r": 0, "oft_block_size": 4, "target_modules": TARGETS}
    found: dict[str, tuple[str, dict[str, object]]] = {
        "oft": ("OFTConfig", oft),
        "oft, 3 terms, adjusted": (
            "OFTConfig",
            {**oft, "num_cayley_neumann_terms": 3, "oft_block_size": 5},
        ),
        "oft, 4 terms, modules": (
            "OFTConfig",
            {**oft, "num_cayley_neumann_terms": 4, "modules_to_save": ["score"]},
        ),
        "oft, exact": ("OFTConfig", {**oft, "use_cayley_neumann": False}),
        "oft, biases": ("OFTConfig", {**oft, "bias": "all"}),
        "coft": ("OFTConfig", {**oft, "coft": True, "eps": 0.3}),
        "boft": ("BOFTConfig", {"boft_block_size": 4, "target_modules": TARGETS, "bias": "all"}),
        "hra": ("HRAConfig", {"r": 4, "target_modules": TARGETS}),
    }
    if version >= (0, 19):
        targets = [*TARGETS, "embed_tokens"]
        found["oft, embedding"] = ("OFTConfig", {**oft, "target_modules": targets})
        # No more than the weights have: what else is a singular vector, each machine chooses.
        found["psoft"] = ("PsoftConfig", {"r": 2, "target_modules": TARGETS})
    return found


def record(name: str, fields: dict[str, object]) -> dict[str, object]:
    """One case: what PEFT writes of a turned model, and what it computes once it is read again."""
    import peft

    turned = peft.get_peft_model(Tiny(), getattr(peft, name)(**fields)).eval()
    for index, (key, parameter) in enumerate(turned.named_parameters()):
        if parameter.requires_grad:
            step = 0.1 * wave(parameter, index + 1)
            if "boft_R" in key:  # as its gradient is
                step = step - step.mT
            parameter.data += step
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        turned.save_pretrained(directory)
        files = {
            file.name: base64.b64encode(file.read_bytes()).decode()
            for file in map(Path(directory).joinpath, FILES)
        }
        read = peft.PeftModel.from_pretrained(Tiny(), directory).eval()
        return {"files": files, "logits": read(IDS).tolist()}


FILES = ("adapter_config.json", "adapter_model.safetensors")

if __name__ == "__main__":
    import peft

    warnings.simplefilter("ignore")
    major, minor, *_ = peft.__version__.split(".")
    recorded = {case: record(*config) for case, config in cases((int(major), int(minor))).items()}
    out = Path(sys.argv[1])
    out.mkdir(exist_ok=True)
    (out / f"{peft.__version__}.json").write_text(json.dumps(recorded, indent=1) + "\n")
