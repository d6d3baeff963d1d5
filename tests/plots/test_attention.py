"""Figures of attention in text, and the logits that they draw."""

from __future__ import annotations

import pytest
import torch

import biassurgery as bs
from biassurgery import plots
from biassurgery.errors import BadBatch, BadOption
from tests.models import CHANNEL, LAYER, LAYERS, planted, tokens
from tests.plots.drawn import rendered
from tests.state import untouched

pytest.importorskip("matplotlib", reason="needs matplotlib (the report extra)")


@pytest.fixture(scope="module")
def model():
    return planted("llama")


@pytest.fixture(scope="module")
def recorded(model):
    what = ("block_input", "norm_output", "q", "k", "v", "value_updates")
    with bs.record(model, what=what, layers=[LAYER + 1]) as rec, torch.no_grad():
        model(tokens(rows=2, length=12))
    return rec


def logits_by_hand(model, ids, layer):
    """Eager attention's own probabilities; their logarithm is the logit less one number a query."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        probs = model(ids, output_attentions=True).attentions[layer].double()
    model.set_attn_implementation("sdpa")
    return probs.log()


def test_mean_logits_are_those_of_the_attention(model):
    ids = tokens(rows=1, length=12)
    with untouched(model, ids):
        means = bs.evaluate.mean_attention_logits(model, ids)
    assert list(means) == list(range(LAYERS))
    for layer, mean in means.items():
        assert mean.shape == (12, 12)
        assert torch.equal(mean.isnan(), torch.ones(12, 12).triu(1).bool())
        wanted = logits_by_hand(model, ids, layer)[0].mean(0)
        # The softmax does not tell the level of a row; differences within it are the logits'.
        torch.testing.assert_close(
            (mean - mean[:, :1])[-1].double(), (wanted - wanted[:, :1])[-1], rtol=1e-4, atol=1e-4
        )


def test_mean_logits_of_long_sequences_are_means_over_runs(model):
    ids = tokens(rows=1, length=24)
    (whole,) = bs.evaluate.mean_attention_logits(model, ids, LAYER).values()
    (small,) = bs.evaluate.mean_attention_logits(model, ids, [LAYER], cells=6).values()
    assert small.shape == (6, 6)
    for row in range(6):
        for column in range(6):
            cell = whole[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            torch.testing.assert_close(small[row, column], cell.nanmean(), equal_nan=True)


def test_mean_logits_that_cannot_be_had(model):
    with pytest.raises(BadBatch, match="sequence: 4 rows"):
        bs.evaluate.mean_attention_logits(model, tokens())
    for cells in (0, 1.5, True):
        with pytest.raises(BadOption, match="cells: "):
            bs.evaluate.mean_attention_logits(model, tokens(rows=1), cells=cells)


def test_logits_have_a_panel_a_layer_on_one_scale(model):
    means = bs.evaluate.mean_attention_logits(model, tokens(rows=1, length=12), [0, 2, 3])
    names = [f"Ġ{i}" for i in range(12)]
    figure = rendered(plots.attention_logits(means, tokens=names))
    panels = figure.axes[:3]
    assert [axes.get_title() for axes in panels] == ["layer 0", "layer 2", "layer 3"]
    limits = {axes.images[0].get_clim() for axes in panels}
    most = max(mean[mean.isfinite()].abs().max().item() for mean in means.values())
    assert limits == {(-most, most)}
    for axes, mean in zip(panels, means.values()):
        drawn = torch.tensor(axes.images[0].get_array().filled(float("nan")))
        torch.testing.assert_close(drawn, mean, equal_nan=True)
        assert [label.get_text() for label in axes.get_xticklabels()] == [
            f"␣{i}" for i in range(12)
        ]
    with pytest.raises(BadOption, match="logits: none"):
        plots.attention_logits({})
    with pytest.raises(BadOption, match="tokens: 3 labels"):
        plots.attention_logits(means, tokens=["a"] * 3)


def test_a_trajectory_has_a_panel_for_every_state(recorded):
    figure = rendered(plots.trajectory(recorded, LAYER + 1))
    assert [axes.get_title() for axes in figure.axes] == [
        "input of the block",
        "after the norm",
        "queries",
        "keys",
        "values",
    ]
    first = figure.axes[0]
    heights = {line.get_data_3d()[1][0]: line.get_data_3d()[2] for line in first.lines}
    state = recorded["block_input"][LAYER + 1][0].abs()
    assert len(heights) == 12
    assert heights[0].max() == state[0, CHANNEL]
    keys = recorded["k"][LAYER + 1][0].transpose(0, 1).flatten(1).abs()
    assert figure.axes[3].lines[5].get_data_3d()[2].tolist() == keys[5].tolist()
    colours = [axes.lines[0].get_color() for axes in figure.axes]
    assert len(set(colours)) == 1
    assert colours[0] != figure.axes[3].lines[5].get_color()
    with pytest.raises(BadOption, match=r"layers: 0 was not recorded"):
        plots.trajectory(recorded, 0)


def test_a_trajectory_follows_the_token_that_stands_out_at_first():
    """Of many tokens it is drawn in every panel, however small it is behind the norm."""
    model = planted("llama")
    what = ("block_input", "norm_output", "q", "k", "v")
    with bs.record(model, what, layers=[LAYER + 1]) as rec, torch.no_grad():
        model(tokens(rows=1, length=100, delimiter_at=None))
    words = [f"w{i}" for i in range(100)]
    figure = rendered(plots.trajectory(rec, LAYER + 1, tokens=words))
    for axes in figure.axes:
        marked = [line.get_data_3d()[1][0] for line in axes.lines if line.get_linewidth() > 1]
        assert marked == [0]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["w0"]


def test_value_updates_are_split_and_compared(recorded):
    figure = rendered(plots.value_updates(recorded, LAYER + 1))
    norms, alike = figure.axes
    split = recorded["value_updates"][LAYER + 1][:, 0].double()
    for part, line, other in zip(split, norms.lines, alike.lines):
        rows = torch.stack([part[:, t].flatten() for t in range(1, 12)])
        torch.testing.assert_close(torch.tensor(line.get_ydata()).double(), rows.norm(dim=1))
        for t in range(11):
            rest = torch.cat([rows[:t], rows[t + 1 :]]).mean(0)
            cosine = (rows[t] @ rest) / (rows[t].norm() * rest.norm())
            assert other.get_ydata()[t] == pytest.approx(cosine.item(), abs=1e-5)
    assert "from sinks" in [text.get_text() for text in alike.get_legend().get_texts()]


def test_value_updates_of_two_tokens_cannot_be_compared(model):
    with bs.record(model, what="value_updates", layers=[0]) as rec, torch.no_grad():
        model(tokens(rows=1, length=2, delimiter_at=None))
    with pytest.raises(BadOption, match="record: a sequence of 2 tokens"):
        plots.value_updates(rec, 0)
