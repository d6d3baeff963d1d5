"""The modes on whole models, against forward hooks that do the same with loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.errors import BatchTooSmall
from biassurgery.modes import MODES, Noise, SetMean, SetValue, ZeroRandom, resolve_mode
from tests import models
from tests.models import CHANNEL, HIDDEN, LAYER, LAYERS
from tests.modes.rewritten import hidden_of, outputs
from tests.state import output_of


@pytest.fixture
def sites(model):
    return bs.calibrate(model, [models.tokens(seed=seed) for seed in (1, 2)])


@contextmanager
def rewritten(
    model: nn.Module,
    family: str,
    sites: bs.Sites,
    layers: list[int],
    write: Callable[[bs.Site], float],
) -> Iterator[None]:
    """The intervention as a forward hook and a loop: each massive value becomes what `write` says
    for its nearest site.
    """

    def rewrite(layer: int, output: Any) -> Any:
        hidden = hidden_of(output).clone()
        for row in range(hidden.shape[0]):
            for token in range(hidden.shape[1]):
                for channel in {site.channel for site in sites.at(layer)}:
                    x = hidden[row, token, channel].item()
                    here = [site for site in sites.at(layer) if site.channel == channel]
                    if abs(x) > min(site.gate for site in here if site.gate is not None):
                        hidden[row, token, channel] = write(
                            min(here, key=lambda site, x=x: abs(site.mean - x))
                        )
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    blocks = models.blocks(model, family)
    hooks = [
        blocks[layer].register_forward_hook(lambda _, __, out, layer=layer: rewrite(layer, out))
        for layer in layers
    ]
    yield
    for hook in hooks:
        hook.remove()


WRITES: dict[str, tuple[dict[str, Any], Callable[[bs.Site], float]]] = {
    "set_mean": ({}, lambda site: site.mean),
    "set_zero": ({}, lambda site: 0.0),
    "set_value": ({"value": -1234.5}, lambda site: -1234.5),
    "noise": ({"scale": 0.0}, lambda site: site.mean),
}


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        (None, [1]),
        ("first", [1]),
        ("all", [1, 2, 3, 4]),
        (2, [2]),
        ([3, 1], [1, 3]),
        ((4,), [4]),
        (range(2, 4), [2, 3]),
    ],
)
@pytest.mark.parametrize("mode", WRITES)
def test_a_write_mode_equals_a_hook_with_a_loop(model, family, sites, mode, layers, chosen):
    ids = models.tokens(rows=3, length=12, seed=9)
    options, write = WRITES[mode]
    before = output_of(model, ids)
    with rewritten(model, family, sites, chosen, write):
        expected = output_of(model, ids)
    with bs.patched(model, mode, sites=sites, layers=layers, **options):
        assert bs.patches(model)[0].layers == tuple(chosen)
        assert torch.equal(output_of(model, ids), expected)
    change = (expected - before).abs().max()
    assert change < 2e-3 if mode in ("set_mean", "noise") else change > 0.5
    assert torch.equal(output_of(model, ids), before)


@pytest.mark.parametrize("mode", ["set_mean", "set_zero", "noise", "shuffle", "zero_random"])
def test_only_what_is_meant_changes_in_the_hidden_state(model, family, sites, mode):
    ids = models.tokens(rows=4, seed=9)
    with outputs(model, family) as plain:
        output_of(model, ids)
    with outputs(model, family) as changed, bs.patched(model, mode, sites=sites):
        output_of(model, ids)
    assert torch.equal(changed[0][0], plain[0][0])  # blocks before the patch
    before = plain[LAYER][0]
    after = changed[LAYER][0]
    massive = torch.zeros_like(before, dtype=torch.bool)
    massive[:, 0, CHANNEL] = True
    massive[:, 9, CHANNEL] = True
    different = before != after
    if mode == "zero_random":
        assert torch.equal(different.sum(-1), massive.sum(-1))
        assert not different[..., CHANNEL].any()
        assert (after[different] == 0).all()
    else:
        assert not (different & ~massive).any()
        assert different[
            :, 9, CHANNEL
        ].all()  # the start token is a constant, so mean and shuffle leave it as it is
    assert not torch.equal(changed[LAYERS - 1][0], plain[LAYERS - 1][0])


def test_noise_has_its_calibrated_spread_in_the_model(model, family, sites):
    ids = models.tokens(rows=4, seed=9)
    (site,) = (s for s in sites.at(LAYER) if s.role == "elsewhere")
    assert site.std > 10
    for scale in (1.0, 3.0):
        with (
            outputs(model, family) as seen,
            bs.patched(model, "noise", sites=sites, scale=scale),
            torch.no_grad(),
        ):
            for _ in range(250):
                model(ids)
        values = torch.stack(seen[LAYER])[:, :, 9, CHANNEL].double()
        assert values.std().item() == pytest.approx(scale * site.std, rel=0.1)
        assert values.mean().item() == pytest.approx(
            site.mean, abs=4 * scale * site.std / 1000**0.5
        )


def test_shuffle_exchanges_the_delimiters_of_the_batch(model, family, sites):
    ids = models.tokens(rows=5, seed=9)
    with outputs(model, family) as plain:
        output_of(model, ids)
    with outputs(model, family) as changed, bs.patched(model, "shuffle", sites=sites):
        output_of(model, ids)
    before, after = (seen[LAYER][0][:, 9, CHANNEL].tolist() for seen in (plain, changed))
    assert sorted(before) == sorted(after)
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_shuffle_refuses_one_sequence_and_the_model_goes_on(model, sites):
    ids = models.tokens(rows=1, seed=9)
    before = output_of(model, ids)
    with bs.patched(model, "shuffle", sites=sites), pytest.raises(BatchTooSmall, match="two"):
        output_of(model, ids)
    assert torch.equal(output_of(model, ids), before)


@pytest.mark.parametrize("mode", ["set_zero", "set_mean", "shuffle"])
def test_a_vision_transformer(mode):
    model = models.planted_vit()
    images = models.images(4, seed=5)
    sites = bs.calibrate(model, [models.images(8)])
    before = output_of(model, images)
    with outputs(model, "timm") as plain:
        output_of(model, images)
    with outputs(model, "timm") as changed, bs.patched(model, mode, sites=sites):
        after = output_of(model, images)
    massive = torch.zeros(17, HIDDEN, dtype=torch.bool)
    massive[[1 + patch for patch in models.PATCHES], CHANNEL] = True
    assert torch.equal((plain[LAYER][0] != changed[LAYER][0]).any(0), massive)
    if mode == "set_mean":
        assert set(changed[LAYER][0][:, massive].flatten().tolist()) == {
            torch.tensor(site.mean).item() for site in sites.at(LAYER)
        }
    assert (after - before).abs().max() > (0.05 if mode == "set_zero" else 0)
    assert torch.equal(output_of(model, images), before)


# -- several channels and levels


def test_every_channel_has_levels_of_its_own(model, family):
    ids = models.tokens(rows=2, seed=9)
    with outputs(model, family) as plain:
        output_of(model, ids)
    sites = bs.Sites(
        [
            bs.Site(2, CHANNEL, "start", 2000.0, gate=700.0),
            bs.Site(2, CHANNEL, "elsewhere", 9500.0, gate=700.0),
            bs.Site(2, 20, "elsewhere", 0.125, gate=0.25),
            bs.Site(2, 20, "elsewhere", -0.5, gate=0.25),
        ]
    )
    with outputs(model, family) as changed, bs.patched(model, "set_mean", sites=sites):
        output_of(model, ids)
    x = plain[2][0][..., 20]
    new = changed[2][0][..., 20]
    expected = torch.where(
        x.abs() > 0.25, torch.where((x - 0.125).abs() <= (x + 0.5).abs(), 0.125, -0.5), x
    )
    assert torch.equal(new, expected)
    assert set(new.flatten().tolist()) > {0.125, -0.5}
    assert changed[2][0][:, 0, CHANNEL].tolist() == [2000.0, 2000.0]
    assert changed[2][0][:, 9, CHANNEL].tolist() == [9500.0, 9500.0]


# -- names and options


def test_a_string_is_sugar_for_a_mode_object(model, sites):
    assert resolve_mode("set_mean", {}) == SetMean()
    assert resolve_mode("noise", {"scale": 2.0}) == Noise(scale=2.0)
    assert resolve_mode("zero_random", {"seed": 3}) == ZeroRandom(seed=3)
    assert resolve_mode(
        "set_value", {"value": 1.0, "channels": [1, 2], "positions": range(2)}
    ) == SetValue(1.0, (1, 2), (0, 1))
    ids = models.tokens(rows=2)
    with bs.patched(model, "set_value", sites=sites, value=5.0):
        by_name = output_of(model, ids)
    with bs.patched(model, SetValue(5.0), sites=sites):
        assert torch.equal(output_of(model, ids), by_name)


def test_every_mode_has_its_name():
    assert {name: mode.name for name, mode in MODES.items()} == {name: name for name in MODES}
    assert set(MODES) >= {"set_mean", "set_zero", "set_value", "noise", "shuffle", "zero_random"}
