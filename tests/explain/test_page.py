"""The page: whole by itself, true to the explanation, readable by machines and in the dark."""

import re
from html.parser import HTMLParser

import pytest
import torch
from torch import fx, nn

import oftfx
from oftfx import OFT
from oftfx.explain.heat import METRICS
from tests.small import Attention, rows

SPEC = OFT(block_size=4, init_std=0.2)
VOID = {"meta", "input", "br", "wbr"}


class Blocks(nn.Module):
    """Two layers of three sites."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Attention() for _ in range(2)))

    def forward(self, x):
        return self.layers(x)


def explained(model=None, **options):
    model = model or oftfx.adapt(fx.symbolic_trace(Blocks()), SPEC)
    return oftfx.explain(model, **options)


class Tree(HTMLParser):
    """Checks that every tag is closed, and keeps what tests ask for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def count(self, tag, **attrs):
        return sum(tag == t and attrs.items() <= a.items() for t, a in self.seen)


def test_it_is_one_whole_page_without_scripts_or_other_files():
    page = explained(layer="auto").to_html()
    tree = Tree(page)
    assert page.startswith("<!doctype html>")
    assert {tag for tag, _ in tree.seen} & {"script", "link", "img", "iframe", "object"} == set()
    assert not re.search(r"https?:|url\(|@import|\bsrc=", page)
    assert "prefers-color-scheme: dark" in page
    assert tree.count("meta", name="viewport") == 1
    assert "$" not in page


def test_the_heat_map_has_a_cell_for_each_site_and_a_switch_for_each_quantity():
    found = explained()
    tree = Tree(found.to_html())
    cells = [attrs for tag, attrs in tree.seen if tag == "td" and "style" in attrs]
    assert len(cells) == len(found.sites) == 8
    for metric in METRICS:
        places = [float(re.search(rf"--{metric.key}:([\d.]+)", c["style"])[1]) for c in cells]
        values = [metric.value(site) for site in found.sites]
        assert max(places) == 1
        assert places.index(1) == values.index(max(values))
        assert all(0 <= place <= 1 for place in places)
        assert f"{metric.label}: {metric.text(values[0])}" in tree.text
        assert tree.count("input", id=f"show-{metric.key}", type="radio") == 1
    assert tree.count("input", checked=None) == 1


def test_it_can_be_read_without_seeing_colours_or_pictures():
    tree = Tree(explained(layer="auto").to_html())
    assert tree.count("title") >= 3  # the page, and both pictures
    assert tree.count("svg", role="img") == 2
    assert tree.count("th", scope="row") == 2
    assert "In words" in tree.text
    assert "All 8 sites in a table" in tree.text
    assert all("label" not in a or a["label"] for tag, a in tree.seen if tag == "label")


def test_it_shows_what_the_table_shows():
    found = explained()
    text = re.sub(r"\s+", " ", Tree(found.to_html()).text)
    header, table = found.summary()
    for row in (header, *table):
        assert all(cell in text for cell in row)
    assert found.total() in text


def test_a_layer_is_drawn_before_and_after():
    page = explained(layer="layers.1").to_html()
    before, after = re.findall(r"<svg.*?</svg>", page, re.S)
    assert before.count('class="box inserted"') == 0
    assert after.count('class="box inserted"') == 4
    assert before.count('class="box site"') == after.count('class="box site"') == 4
    assert "layers.1, before" in before


def test_auto_draws_the_first_of_the_layers_with_the_most_sites():
    assert explained(layer="auto").graph.layer == "layers.0"


def test_why_there_is_no_picture_is_said():
    x = rows(torch.float32)
    model = oftfx.adapt(Attention(), SPEC, example_inputs=x)
    found = explained(model, layer="auto")
    assert "pass example_inputs" in found.graph
    assert found.graph in Tree(found.to_html()).text
    assert "<svg" in explained(model, layer="auto", example_inputs=x).to_html()


def test_names_are_escaped():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<script>alert('&')", nn.Linear(8, 8))

        def forward(self, x):
            return next(self.children())(x)

    Odd.__name__ = "<b>Odd</b>"
    x = rows(torch.float32)
    model = oftfx.adapt(Odd(), SPEC, example_inputs=x)
    page = explained(model, layer="auto", example_inputs=x).to_html()
    tree = Tree(page)
    assert "<script" not in page
    assert "<b>Odd" not in page
    assert "<script>alert('&')" in tree.text


def test_what_diverged_stands_out():
    model = oftfx.adapt(fx.symbolic_trace(Blocks()), SPEC)
    assert "diverged" not in explained(model).to_html()
    with torch.no_grad():
        oftfx.parameters(model)[0].fill_(2.0)
        oftfx.parameters(model)[1].fill_(float("nan"))
    found = explained(model)
    page = found.to_html()
    assert [site.diverged for site in found.sites].count(True) == 2
    assert "2 sites diverged" in page
    assert page.count('class="broken"') == 2
    assert "nan" in str(found)


def test_several_adapters_have_a_map_each():
    x = rows(torch.float32)
    model = oftfx.adapt(Attention(), SPEC, example_inputs=x)
    oftfx.adapt(model, oftfx.HRA(rank=2), "second", example_inputs=x)
    tree = Tree(explained(model).to_html())
    assert tree.count("table", **{"class": "map"}) == 2
    assert tree.count("caption") == 2


def test_what_compiling_did_is_told(monkeypatch):
    counts = {"graphs": 1, "rotations": 8, "cores": 8, "group": 4, "fuse_norm_left": 2}
    found = oftfx.Explanation(explained().sites, compiled=2, counts=counts)
    text = Tree(found.to_html()).text
    assert "2 parts compiled" in text
    assert "fuse_norm_left" in text


def test_it_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    found = explained()
    found.save_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text("utf-8") == found.to_html()
    monkeypatch.setattr(oftfx.Explanation, "to_html", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        found.save_html(tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").stat().st_size > 1000
