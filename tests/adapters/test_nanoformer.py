"""The whole library on a model of plain torch that another package makes known: every verb works,
or says truly why it does not.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biassurgery as bs
from biassurgery.adapters.registry import adapters
from biassurgery.errors import BadOption
from tests import models
from tests.adapters.conftest import THIRD_PARTY, run_with
from tests.contract.cases import VARIANTS
from tests.models import CHANNEL, HEADS, HIDDEN, LAYER, LAYERS, START
from tests.state import bits, untouched

IDS = models.tokens()
SIZE = HIDDEN // HEADS


@pytest.fixture
def nano(_own_registry, monkeypatch) -> Any:
    """A planted Nanoformer, its adapter registered."""
    monkeypatch.syspath_prepend(str(THIRD_PARTY))
    from nanoformer import Nanoformer  # type: ignore[import-not-found]
    from nanoformer.surgery import NanoformerAdapter  # type: ignore[import-not-found]

    bs.register_adapter(NanoformerAdapter)
    torch.manual_seed(0)
    return planted(Nanoformer().eval())


def planted(model: Any) -> Any:
    """Massive activations as in tests/models.py: `START` at the start token, larger ones at the
    delimiter, in `CHANNEL` from block `LAYER` on.
    """
    with torch.no_grad():
        for table in (model.wte, model.wpe):
            models.clear(table.weight, *models.KEYS.values())
        for block in model.h:
            for layer in (block.attn.out, block.down):
                layer.weight.mul_(3.0)
                for rows in (layer.weight.T, layer.bias[None]):
                    models.clear(rows, *models.KEYS.values(), CHANNEL)
        for token, key in models.KEYS.items():
            model.wte.weight[token] = 0.0
            model.wte.weight[token, key] = 4.0
        block = model.h[LAYER]
        for token, position, level in (
            (models.START_ID, 0, START),
            (models.DELIMITER_ID, 9, models.DELIMITER),
        ):
            models.grow(
                model,
                block,
                [block.up.weight],
                [block.down.weight],
                IDS,
                torch.tensor([position]),
                token,
                level,
            )
    return model


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids)[0]


def hidden(model: Any, layer: int, ids: Tensor = IDS) -> Tensor:
    """The output of a block, written out."""
    with torch.no_grad():
        x = model.wte(ids) + model.wpe(torch.arange(ids.shape[1]))
        for block in model.h[: layer + 1]:
            x = block(x)
    return x


def query_and_probs(model: Any, layer: int) -> tuple[Tensor, Tensor]:
    """The queries (B, H, T, d) and the attention (B, H, T, T) of a layer, written out."""
    with torch.no_grad():
        read = model.h[layer].ln_1(hidden(model, layer - 1))
        q, k, _ = (
            part.reshape(*IDS.shape, HEADS, SIZE).transpose(1, 2)
            for part in model.h[layer].attn.qkv(read).split(HIDDEN, -1)
        )
    scores = (q @ k.mT / math.sqrt(SIZE)).masked_fill(
        torch.ones(IDS.shape[1], IDS.shape[1]).triu(1).bool(), -torch.inf
    )
    return q, scores.softmax(-1)


def mean_loss(model: Any, ids: Tensor) -> float:
    rows = [
        F.cross_entropy(row[:-1].double(), target[1:])
        for row, target in zip(logits(model, ids), ids)
    ]
    return torch.stack(rows).mean().item()


def test_its_adapter_is_short():
    source = (THIRD_PARTY / "nanoformer" / "surgery.py").read_text()
    body = source[source.index("class NanoformerAdapter") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 20
    assert "def run" not in body
    assert "def inputs" not in body


def test_massive_activations_are_found_and_measured(nano):
    sites = bs.calibrate(nano, IDS)
    assert {(s.layer, s.channel, s.role) for s in sites} == {
        (layer, CHANNEL, role) for layer in range(LAYER, LAYERS) for role in ("start", "elsewhere")
    }
    start = next(s for s in sites if (s.layer, s.role) == (LAYER, "start"))
    assert start.mean == pytest.approx(hidden(nano, LAYER)[:, 0, CHANNEL].mean().item(), rel=1e-6)
    assert sites.origin.architecture == "nanoformer"


@pytest.mark.parametrize(
    "batch", [IDS, {"idx": IDS}, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
)
def test_a_batch_may_have_either_name(nano, batch):
    assert bs.calibrate(nano, batch) == bs.calibrate(nano, [IDS])
    assert bs.perplexity(nano, [batch]) == pytest.approx(math.exp(mean_loss(nano, IDS)), rel=1e-6)


def test_detect_reports_sinks(nano):
    found = bs.detect(nano, IDS)
    assert found.sites == bs.calibrate(nano, IDS)
    assert found.sinks is not None
    assert len(found.sinks.layers) == LAYERS
    _, probs = query_and_probs(nano, 2)
    assert found.sinks.layers[2].attention == pytest.approx(
        probs[:, :, 1:, 0].mean((0, 2)).tolist(), abs=1e-6
    )


@pytest.mark.parametrize("call", [lambda m: m(IDS), lambda m: m(idx=IDS), lambda m: m(IDS, IDS)])
def test_record(nano, call):
    with bs.record(nano, what=("block_output", "q", "probs", "sink_mass"), layers=[2]) as rec:
        call(nano)
    q, probs = query_and_probs(nano, 2)
    assert torch.equal(rec["block_output"][2], hidden(nano, 2))
    assert torch.equal(rec["q"][2], q)
    torch.testing.assert_close(rec["probs"][2], probs, rtol=0, atol=1e-6)
    torch.testing.assert_close(rec["sink_mass"][2], probs[..., 0], rtol=0, atol=1e-6)


def test_perplexity_of_a_stream_takes_windows_of_the_learned_context(nano):
    stream = torch.randint(2, 90, (100,), generator=torch.Generator().manual_seed(3))
    windows = stream[:96].view(2, 48)
    assert bs.perplexity(nano, stream) == pytest.approx(
        math.exp(mean_loss(nano, windows)), rel=1e-6
    )
    with pytest.raises(BadOption, match=r"length: 49 .* 48 positions"):
        bs.perplexity(nano, stream, length=49)


def test_a_start_token_is_transplanted_exactly(nano):
    key_values = bs.calibrate_key_values(nano, IDS)
    wanted = logits(nano)[:, 1:]
    assert (logits(nano, IDS[:, 1:]) - wanted).abs().max() > 1e-2  # the token is missed
    with (
        untouched(nano),
        bs.patched(nano, "transplant", key_values=key_values),
    ):
        without = logits(nano, IDS[:, 1:])
    torch.testing.assert_close(without, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


def test_compare(nano):
    sites = bs.calibrate(nano, IDS)
    table = bs.compare(nano, lambda model: bs.perplexity(model, IDS), sites=sites)
    assert table["original"] == pytest.approx(math.exp(mean_loss(nano, IDS)), rel=1e-6)
    assert table["set_zero"] != pytest.approx(table["original"], rel=1e-3)
    assert table["set_mean"] == pytest.approx(table["original"], rel=1e-5)


ALIKE = ("set_mean", "noise", "shuffle", "zero_random")


def arguments(nano: nn.Module, variant: str) -> dict[str, Any]:
    name, options = VARIANTS[variant]
    needs = {"transplant": {"key_values": bs.calibrate_key_values(nano, IDS)}}
    if name in ("instrument", "attention_bias", "transplant", "rescale"):
        return {**options, **needs.get(name, {})}
    layers = [LAYER] if "positions" in options else "all"
    return {**options, "sites": bs.calibrate(nano, IDS), "layers": layers}


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if not v.startswith(("fix_registers", "test_time"))]
)
def test_every_mode_is_applied_saved_loaded_and_undone(nano, variant, tmp_path):
    fresh = copy.deepcopy(nano)
    before = logits(nano)
    with untouched(nano):
        torch.manual_seed(5)
        bs.patch_model(nano, VARIANTS[variant][0], **arguments(nano, variant))
        torch.manual_seed(6)
        patched = logits(nano)
        bs.save_patch(nano, tmp_path)
        bs.unpatch_model(nano)
    change = (patched - before).abs().max()
    if variant in ("instrument", "rescale", "pin"):  # the start token is a constant
        assert change < 1e-5
    elif variant in ALIKE:  # the values vary little, and so does what they are replaced by
        assert 0 < change < 1e-2
    else:
        assert change > 1e-2
    assert bits(logits(nano)) == bits(before)
    bs.load_patch(fresh, tmp_path)
    torch.manual_seed(6)
    assert torch.equal(logits(fresh), patched)
    bs.unpatch_model(fresh)
    assert bits(logits(fresh)) == bits(before)


def test_a_saved_patch_is_loaded_by_another_process(nano, installed, tmp_path):
    torch.save(nano.state_dict(), tmp_path / "weights.pt")
    bs.patch_model(nano, "attention_bias", init="normal", std=1.0)
    bs.patch_model(nano, "set_zero", sites=bs.calibrate(nano, IDS))
    torch.save((IDS, logits(nano)), tmp_path / "output.pt")
    bs.save_patch(nano, tmp_path / "patch")
    done = run_with(
        installed,
        f"""
import sys, torch
import biassurgery as bs
from nanoformer import Nanoformer

folder = {str(tmp_path)!r}
model = Nanoformer().eval()
model.load_state_dict(torch.load(folder + "/weights.pt"))
ids, wanted = torch.load(folder + "/output.pt")
with torch.no_grad():
    before = model(ids)[0]
    bs.load_patch(model, folder + "/patch")
    assert (model(ids)[0] - wanted).abs().max() < 1e-4 < (before - wanted).abs().max()
    bs.unpatch_model(model)
    assert torch.equal(model(ids)[0], before)
assert "transformers" not in sys.modules
""",
    )
    assert done.returncode == 0, done.stderr


SINK_CACHE = "no decoder of transformers, and only those take a cache"
PADDED = {
    "input_ids": IDS,
    "attention_mask": torch.ones_like(IDS).index_fill(1, torch.tensor(0), 0),
}
REFUSED = {
    "padding": (lambda m: bs.calibrate(m, PADDED), "attention_mask has zeros.*takes no mask"),
    "padding, perplexity": (lambda m: bs.perplexity(m, PADDED), "attention_mask has zeros"),
    "positions": (
        lambda m: bs.calibrate(m, {"idx": IDS, "position_ids": IDS}),
        "position_ids, which Nanoformer does not take",
    ),
    "token ids": (lambda m: bs.calibrate(m, IDS + 90), "token .* is not among the 96"),
    "pixels": (
        lambda m: bs.calibrate(m, {"pixels": models.images()}),
        "no tensor 'input_ids'",
    ),
    "no sites": (lambda m: bs.patch_model(m, "set_mean"), "not loaded from a named checkpoint"),
    "SinkCache": (lambda m: bs.SinkCache(m, 16), SINK_CACHE),
    "streaming": (lambda m: bs.streaming_perplexity(m, IDS[0], empty_cache()), SINK_CACHE),
    "images": (lambda m: bs.top1_accuracy(m, [(IDS, IDS[:, 0])]), "Nanoformer"),
    "registers": (lambda m: bs.calibrate_registers(m, IDS), "Nanoformer has no register tokens"),
    "neurons": (lambda m: bs.find_register_neurons(m, IDS), "Nanoformer"),
    "[CLS]": (lambda m: bs.cls_attention(m, IDS), "Nanoformer"),
    "tower": (lambda m: bs.calibrate(m, IDS, tower="vision"), "tower: 'vision'; Nanoformer"),
}


def empty_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_apply_is_refused(nano, name):
    call, reason = REFUSED[name]
    with untouched(nano), pytest.raises(bs.SurgeryError, match=reason):
        call(nano)


def test_what_its_adapter_does_not_say_is_told_by_its_structure(nano):
    adapter = adapters()[0]
    assert type(adapter).__name__ == "NanoformerAdapter"
    assert adapter.context(nano) == 48
    assert adapter.learned_positions(nano)
    assert adapter.attention_limits(nano) == {}
    assert adapter.attention_chunk(nano) is None
    assert not adapter.recurrent(nano)


def of_class(nano: Any, **methods: Any) -> Any:
    """The model, with a class that has further methods."""
    nano.__class__ = type("Variant", (type(nano),), methods)
    return nano


def last_logits(self: Any, idx: Tensor) -> tuple[Tensor, None]:
    x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
    for block in self.h:
        x = block(x)
    return self.head(self.ln_f(x[:, [-1]])), None


def test_key_values_of_a_model_that_gives_the_logits_of_the_last_token_only(nano):
    wanted = bs.calibrate_key_values(nano, IDS)
    found = bs.calibrate_key_values(of_class(nano, forward=last_logits), IDS)
    assert torch.equal(found.keys, wanted.keys)
    assert torch.equal(found.values, wanted.values)


def test_what_acts_beside_the_start_tokens_key_and_value_is_seen_in_the_last_logits(nano):
    def forward(self: Any, idx: Tensor) -> tuple[Tensor, None]:
        x = self.wte(idx) + self.wte(idx).sum(1, keepdim=True)
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x[:, [-1]])), None

    with pytest.raises(bs.SurgeryError, match="acts through more than its keys and values"):
        bs.calibrate_key_values(of_class(nano, forward=forward), IDS)


def test_logits_in_a_dict(nano):
    wanted = bs.perplexity(nano, IDS)
    plain = type(nano).forward
    variant = of_class(nano, forward=lambda self, idx: {"logits": plain(self, idx)[0]})
    assert bs.perplexity(variant, IDS) == wanted


def test_an_adapter_that_has_another_name_for_the_token_ids_than_the_model(nano):
    plain = type(nano).forward
    variant = of_class(nano, forward=lambda self, words: plain(self, words))
    with pytest.raises(bs.SurgeryError, match=r"adapter of nanoformer .* 'idx', .* takes words;"):
        bs.calibrate(variant, IDS)


def read_input(nano: Any) -> None:
    with bs.record(nano, "norm_output"):
        nano(IDS)


def read_blocks(nano: Any) -> None:
    with bs.record(nano, "block_input"):
        nano(IDS)


def test_an_attention_that_calls_its_input_by_another_name(nano):
    """What reads it is refused; keys and values do not go through it."""
    expected = bs.calibrate_key_values(nano, IDS)
    for block in nano.h:
        attention = type(block.attn).forward
        of_class(block.attn, forward=lambda self, *, x, plain=attention: plain(self, x))
        of_class(block, forward=called_by_name)
    with (
        untouched(nano),
        pytest.raises(bs.SurgeryError, match=r"an attention was called with x, .*hidden_states"),
    ):
        read_input(nano)
    found = bs.calibrate_key_values(nano, IDS)
    assert all(map(torch.equal, found.keys, expected.keys))
    assert all(map(torch.equal, found.values, expected.values))


def called_by_name(self: Any, x: Tensor) -> Tensor:
    x = x + self.attn(x=self.ln_1(x))
    return x + self.down(F.gelu(self.up(self.ln_2(x))))


def test_a_block_that_calls_its_input_by_another_name(nano):
    for block in nano.h:
        plain = type(block).forward
        of_class(block, forward=lambda self, *, x, plain=plain: plain(self, x))

    def forward(self: Any, idx: Tensor) -> tuple[Tensor, None]:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = block(x=x)
        return self.head(self.ln_f(x)), None

    of_class(nano, forward=forward)
    assert len(bs.calibrate(nano, IDS))
    with untouched(nano), pytest.raises(bs.SurgeryError, match="a block was called with x, "):
        read_blocks(nano)


def test_a_route_through_a_config_that_there_is_not(nano, monkeypatch):
    from biassurgery.surgery.routes import ThroughInterface

    adapter = type(adapters()[0])
    plain = adapter.attention
    monkeypatch.setattr(
        adapter,
        "attention",
        lambda self, model, block: plain(self, model, block)._replace(route=ThroughInterface),
    )
    with untouched(nano), pytest.raises(bs.SurgeryError, match="no config that names"):
        bs.patch_model(nano, "attention_bias")
