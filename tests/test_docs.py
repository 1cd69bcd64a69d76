"""The documentation is true: its snippets run, and do what the page says.

The Python snippets of a page run in order and share one namespace. A `text` block right after one
is what it prints, or the oftfx error or warning it ends with; line breaks and line numbers of code
are not compared. A snippet's title is its file name.
"""

import ast
import contextlib
import io
import re
import sys
import tomllib
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer
from torch import nn

import oftfx
import oftfx.train
from oftfx import cli, sites
from oftfx.errors import OftfxError, OftfxWarning

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
FENCE = re.compile(
    r"""^```(?P<language>\w*)(?: title="(?P<title>[^"\n]+)")?\n(?P<code>.*?)^```\n"""
    r"""(?:\n```text\n(?P<printed>.*?)^```)?""",
    re.M | re.S,
)


class Snippet(NamedTuple):
    file: str
    line: int
    code: str
    printed: str | None

    def run(self, namespace: dict[str, object]) -> str:
        out = io.StringIO()
        # Blank lines in front make a traceback point into the page.
        code = self.code if self.file.endswith(".py") else "\n" * self.line + self.code
        with contextlib.redirect_stdout(out), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", OftfxWarning)
            try:
                exec(compile(code, self.file, "exec"), namespace)
            except OftfxError as error:
                if self.printed is None:
                    raise
                print(f"{type(error).__name__}: {error}")
            for warning in caught:
                if issubclass(warning.category, OftfxWarning):
                    print(f"{warning.category.__name__}: {warning.message}")
        return out.getvalue()


def snippets(page: Path) -> Iterator[Snippet]:
    text = page.read_text("utf-8")
    for match in FENCE.finditer(text):
        if match["language"] == "python":
            line = text.count("\n", 0, match.start()) + 1
            yield Snippet(match["title"] or page.name, line, match["code"], match["printed"])


def has_snippets(page: Path) -> bool:
    return any(snippets(page))


def run(page: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Runs a page and returns its namespace: a module, named like the snippet that runs in it."""
    module = types.ModuleType("page")
    for snippet in snippets(page):
        module.__name__ = Path(snippet.file).stem.replace("-", "_")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        printed = snippet.run(vars(module))
        if snippet.printed is not None:
            where = f"{page.relative_to(ROOT)}, line {snippet.line}"
            assert comparable(printed) == comparable(snippet.printed), where
    return module


def comparable(text: str) -> list[str]:
    return re.sub(r"\.py:\d+", ".py:…", text).split()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A directory of its own, for pages that write files."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("page", [*filter(has_snippets, PAGES)], ids=lambda page: page.stem)
def test_snippets_do_what_the_page_says(page, monkeypatch):
    run(page, monkeypatch)


def test_most_pages_have_snippets():
    assert sum(map(has_snippets, PAGES)) >= 6


@pytest.mark.usefixtures("elsewhere")
def test_the_guides_provider_works(monkeypatch):
    """The page is a provider itself: it defines what a file in sites/ defines."""
    provider = run(DOCS / "guides" / "add-a-quantiser.md", monkeypatch)
    monkeypatch.setattr(sites, "PROVIDERS", (*sites.PROVIDERS, provider))
    model, x = nn.Sequential(provider.ScaledLinear(64, 32)), torch.randn(2, 64)
    expected = model(x)
    oftfx.adapt(model, oftfx.OFT(init_std=0.01), example_inputs=x)
    assert isinstance(model[0], provider.ScaledLinear)
    assert oftfx.plan(model, oftfx.OFT(), x).sites[0].kind == provider.KIND
    rotated = model(x)
    assert not torch.equal(rotated, expected)
    torch.testing.assert_close(oftfx.merge(model)(x), rotated)


def said(tree: ast.AST) -> Iterator[ast.expr]:
    """What a module raises, warns of or exits with."""
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or not call.args:
            continue
        if call is not node or ast.unparse(call.func) in ("warnings.warn", "sys.exit"):
            yield call.args[0]


def pattern(message: ast.expr) -> str:
    """A regular expression of all that an f-string can become."""
    match message:
        case ast.Constant(value=str(text)):
            return re.escape(text)
        case ast.JoinedStr(values=parts):
            return "".join(map(pattern, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return pattern(left) + pattern(right)
    return ".+?"


def test_troubleshooting_quotes_real_messages():
    """Headings are part of what the section's snippet prints; tables quote the source."""
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    sections = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    headed = [(title.strip("` "), body) for title, body in sections if title.startswith("`")]
    assert len(headed) > 15
    for message, body in headed:
        printed = " ".join(re.findall(r"^```text\n(.*?)^```", body, re.M | re.S))
        assert message in re.sub(r"\s+", " ", printed), message
    trees = (ast.parse(path.read_text("utf-8")) for path in Path(oftfx.__path__[0]).rglob("*.py"))
    known = [re.compile(pattern(each), re.S) for tree in trees for each in said(tree)]
    known = [each for each in known if len(each.pattern.replace(".+?", "")) > 12]
    quoted = re.findall(r"^\| `([^`]+)`", text, re.M)
    assert len(quoted) > 5
    for message in quoted:
        assert any(each.fullmatch(message) for each in known), message


def test_cli_page_lists_every_option_and_no_other():
    commands = typer.main.get_command(cli.app).commands.values()
    flags = {flag for c in commands for p in c.params for flag in (*p.opts, *p.secondary_opts)}
    flags = {flag for flag in flags if flag.startswith("--")}
    for page in PAGES:
        lines = [line for line in page.read_text("utf-8").splitlines() if line.startswith("oftfx ")]
        assert set(re.findall(r"--[a-z-]+", "\n".join(lines))) <= flags | {"--help"}, page
    listed = set(re.findall(r"`(--[a-z-]+)", (DOCS / "cli.md").read_text("utf-8")))
    assert listed == flags - {"--help"}


def test_api_page_lists_every_public_name():
    page = (DOCS / "api.md").read_text("utf-8")
    listed = set(re.findall(r"(?:^:::|heading:) (oftfx[\w.]+)", page, re.M))
    public = {f"oftfx.{name}" for name in oftfx.__all__}
    public |= {f"oftfx.train.{name}" for name in oftfx.train.__all__}
    assert public <= listed


def test_every_link_between_pages_leads_somewhere():
    for page in (*PAGES, ROOT / "CHANGELOG.md"):
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == oftfx.__version__
    assert f"[{oftfx.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
