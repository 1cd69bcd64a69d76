import subprocess
import sys

# A finder placed first refuses every third-party package but the two the core needs. What these
# two import themselves is their own business, so the guard goes up after they are in.
PROGRAM = """
import sys
import torch, optree

allowed = set(sys.stdlib_module_names) | {name.partition(".")[0] for name in sys.modules}
class Guard:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed | {"oftfx"}:
            raise ModuleNotFoundError(f"{name} is imported by oftfx", name=name)
        return None
sys.meta_path.insert(0, Guard())

before = set(sys.modules)
import oftfx
print(*sorted(set(sys.modules) - before))
"""


def test_importing_needs_torch_and_optree_alone():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "oftfx" in done.stdout.split()
    # Light: the compiler and the training stack come with what uses them.
    heavy = ("torch._dynamo", "torch._inductor", "torch.export", "oftfx.train", "oftfx.cli")
    heavy += ("oftfx.ops.triton.",)
    assert not [name for name in done.stdout.split() if name.startswith(heavy)]
