"""The page: what stands on it is what was measured, and it needs nothing else."""

from __future__ import annotations

import html
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import biassurgery as bs
from biassurgery.errors import BadBatch, FileError, MissingPackage
from biassurgery.reports import mechanism
from tests import encoders, models
from tests.state import untouched

vl_convert = pytest.importorskip("vl_convert", reason="needs vl-convert-python (the report extra)")


def data_of(page: Path) -> dict[str, dict[str, Any]]:
    """What the page's script draws, by the name of the section."""
    text = page.read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return {part["name"]: part for part in json.loads(data)}


def column(part: dict[str, Any], header: str, **where: Any) -> list[Any]:
    """The cells of a column in the rows where others are as given."""
    columns = part["columns"]
    rows = range(len(columns[header]))
    return [columns[header][i] for i in rows if all(columns[n][i] == w for n, w in where.items())]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A report on a decoder with planted values, the model, and its data."""
    model = models.planted("llama")
    batches = [models.tokens(seed=1), models.tokens(seed=2)]
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    with untouched(model, batches[0]):
        written = bs.report(
            model,
            batches,
            path,
            evaluation=[models.tokens(seed=3)],
            name="a </script> model",
            source="random words",
            command="report me",
            progress=False,
        )
    assert written == path
    return model, batches, path


def test_the_page_needs_nothing_else(text):
    page = text[2].read_text()
    assert len(page) < 5_000_000
    # Nothing is loaded from anywhere; an address in the library's text is none that is fetched.
    outside = page[: page.index('<script type="module">')]
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', outside) == []
    assert "@import" not in outside
    assert "url(" not in outside
    assert "<title>a &lt;/script&gt; model</title>" in page


def test_the_verdict_and_the_advice_are_those_of_the_diagnosis(text):
    model, batches, path = text
    found = bs.diagnose(model, batches)
    page = html.unescape(path.read_text())
    for line in (*found.verdict, *found.advice):
        assert f"<li>{line}</li>" in page
    for said in ("random words", "report me", "magnitude above 100 and above 1000 times"):
        assert said in page


def test_the_tables_hold_what_was_measured(text):
    model, batches, path = text
    data = data_of(path)
    found = bs.detect(model, batches)
    for layer in found.layers:
        for name, value in zip(
            ("largest", "second", "third", "median"), (*layer.top, layer.median)
        ):
            shown = column(data["magnitudes"], "magnitude", block=layer.layer, value=name)
            assert shown == [pytest.approx(value, rel=1e-5)]
    for layer in found.sinks.layers:
        shown = column(data["sinks"], "share of the attention", layer=layer.layer)
        assert shown == pytest.approx(layer.attention, rel=1e-5)
    losses = [bs.perplexity(model, models.tokens(seed=3))]
    for mode in ("set_zero", "set_mean"):
        with bs.patched(model, mode, sites=found.sites):
            losses.append(bs.perplexity(model, models.tokens(seed=3)))
    assert data["interventions"]["columns"]["perplexity"][:3] == pytest.approx(losses, rel=1e-5)
    born = [site for site in found.sites if site.first]
    assert data["sites"]["columns"]["mean"] == pytest.approx([s.mean for s in born], rel=1e-5)


def test_the_tokens_are_those_of_the_first_sequence(text):
    model, batches, path = text
    data = data_of(path)["tokens"]
    with torch.no_grad():
        states = model(batches[0][:1], output_hidden_states=True).hidden_states
    for layer in range(models.LAYERS - 1):  # the last one is read before the final norm
        shown = column(data, "magnitude", block=layer)
        wanted = states[layer + 1][0].abs().amax(-1).tolist()
        assert shown == pytest.approx(wanted, rel=1e-4)
    assert column(data, "channel", block=models.LAYER, position=0) == [models.CHANNEL]
    assert column(data, "token", block=0) == [str(token) for token in batches[0][0].tolist()]


def test_every_chart_can_be_drawn(text):
    for name, part in data_of(text[2]).items():
        if part["chart"] is None:
            continue
        columns = part["columns"]
        rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
        spec = {**part["chart"], "data": {"name": "rows", "values": rows}}
        svg = vl_convert.vegalite_to_svg(spec)
        assert svg.startswith("<svg"), name
        for channel in part["chart"]["encoding"].values():
            for field in channel if isinstance(channel, list) else [channel]:
                assert field["field"] in columns


def test_images(tmp_path):
    model = models.planted_vit()
    pictures = models.images(4)
    path = bs.report(model, [pictures], tmp_path / "vit.html", progress=False)
    data = data_of(path)
    tokens = data["tokens"]["columns"]["token"][:17]
    assert tokens == ["cls", *(f"patch {i}" for i in range(16))]
    zero, mean = (
        column(data["interventions"], "degrees", mode=m)[0] for m in ("set_zero", "set_mean")
    )
    assert zero > 1 > 0.1 > mean
    sites = bs.calibrate(model, [pictures])
    whole = model.forward_head(model.forward_features(pictures), pre_logits=True).double()
    with bs.patched(model, "set_zero", sites=sites):
        cut = model.forward_head(model.forward_features(pictures), pre_logits=True).double()
    turned = torch.nn.functional.cosine_similarity(whole, cut).arccos().rad2deg().mean()
    assert zero == pytest.approx(turned.item(), rel=1e-4)


def test_a_model_without_massive_activations_has_a_page(tmp_path):
    model = models.planted("llama")
    path = bs.report(model, [models.tokens()], tmp_path / "r.html", min_ratio=1e9, progress=False)
    assert "massive activations: none in" in path.read_text()
    shown = data_of(path)
    assert {"interventions", "sites", "carriers", "life"}.isdisjoint(shown)
    assert {"magnitudes", "ranks", "channels", "sink-kinds"} <= set(shown)


def test_what_cannot_be_reported(tmp_path, monkeypatch):
    model = models.planted("llama")
    with pytest.raises(BadBatch, match="batches: an iterator"):
        bs.report(model, iter([models.tokens()]), tmp_path / "r.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="path: "):
        bs.report(model, [models.tokens()], "")
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(MissingPackage, match=r"biassurgery\[report\]"):
        bs.report(model, [models.tokens()], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_body_without_a_head_has_no_perplexity_and_the_page_says_so(tmp_path):
    body = models.planted("llama").model
    path = bs.report(body, [models.tokens()], tmp_path / "body.html", progress=False)
    assert "Not measured. " in path.read_text()
    assert data_of(path)["interventions"]["columns"] == {}
    assert "magnitudes" in data_of(path)


def test_a_constant_token_in_front(tmp_path):
    model = models.planted("llama")
    rest = models.tokens()[:, 1:]
    written = bs.report(model, [rest], tmp_path / "r.html", start=models.START_ID, progress=False)
    other = bs.report(model, [models.tokens()], tmp_path / "o.html", progress=False)
    for name in ("magnitudes", "tokens", "sinks", "linears"):
        assert data_of(written)[name]["columns"] == data_of(other)[name]["columns"]


def test_tokens_behind_the_patches_keep_their_names(tmp_path):
    from transformers import YolosConfig, YolosModel

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[28, 28],
        patch_size=7,
        num_detection_tokens=3,
    )
    path = bs.report(YolosModel(config).eval(), [torch.randn(2, 3, 28, 28)], tmp_path / "y.html")
    labels = data_of(path)["tokens"]["columns"]["token"][:20]
    detections = [f"detection {i}" for i in range(3)]
    assert labels == ["cls", *(f"patch {i}" for i in range(16)), *detections]


def test_the_tables_of_one_hidden_state(text):
    model, batches, path = text
    data = data_of(path)
    sites = bs.calibrate(model, batches)
    tables = bs.evaluate.hidden_state_tables(model, batches, sites=sites)
    for row in tables.magnitudes.rows:
        assert column(data["ranks"], "magnitude", rank=row.rank) == [
            pytest.approx(row.magnitude, rel=1e-5)
        ]
    assert data["variation"]["columns"]["mean"] == pytest.approx(
        [row.mean for row in tables.variation.rows], rel=1e-5
    )
    assert data["carriers"]["columns"]["id"] == [row.token_id for row in tables.carriers.rows]
    assert data["carriers"]["columns"]["times"] == [8, 8]


def test_the_sections_on_how_it_works(text):
    model, batches, path = text
    data = data_of(path)
    channels = bs.evaluate.channel_table(model, batches).channels
    assert data["channels"]["columns"]["largest"] == pytest.approx(
        [one.largest for one in channels], rel=1e-5
    )
    assert column(data["channels"], "kind", channel=models.CHANNEL) == ["massive"]
    life = bs.evaluate.value_life(model, batches, bs.diagnose(model, batches))
    assert data["life"]["columns"]["value"] == pytest.approx(
        [b.value for b in life.blocks], rel=1e-5
    )
    page = html.unescape(path.read_text())
    assert life.weights[0].place in page
    assert re.search(
        r'<img src="data:image/png;base64,[^"]+" alt="Lines over blocks: the value', page
    )
    kinds = bs.evaluate.sink_kinds(model, batches)
    shares = data["sink-kinds"]["columns"]["share"]
    assert shares == pytest.approx([head.share for head in kinds.heads], rel=1e-5)


def test_sinks_of_images_are_the_patches_with_massive_activations(tmp_path):
    model = models.planted_vit()
    pictures = models.images(4)
    data = data_of(bs.report(model, [pictures], tmp_path / "v.html", progress=False))
    at = tuple(1 + patch for patch in models.PATCHES)
    kinds = bs.evaluate.sink_kinds(model, [pictures], sink_tokens=at)
    assert data["sink-kinds"]["columns"]["share"] == pytest.approx(
        [head.share for head in kinds.heads], rel=1e-5
    )


def test_one_token_is_refused_in_one_clear_line(tmp_path):
    one = models.tokens(length=1, delimiter_at=None)
    with pytest.raises(BadBatch, match=r"batches: .*one token") as refused:
        bs.report(models.planted("llama"), [one], tmp_path / "r.html", progress=False)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "r.html").exists()


def test_an_encoder_has_a_page_without_a_perplexity(tmp_path):
    model = encoders.planted("bert").base_model
    path = bs.report(model, [models.tokens()], tmp_path / "b.html", progress=False)
    data = data_of(path)
    assert {"magnitudes", "ranks", "channels", "sink-kinds", "life"} <= set(data)
    assert "Not measured. " in path.read_text()


def test_the_figures_are_of_the_first_sequences(tmp_path, monkeypatch):
    monkeypatch.setattr(mechanism, "_TABLES", 96)
    model = models.planted("llama")
    batches = [models.tokens(seed=1), models.tokens(seed=2)]
    data = data_of(bs.report(model, batches, tmp_path / "f.html", progress=False))
    assert data["carriers"]["columns"]["times"] == [4, 4]
