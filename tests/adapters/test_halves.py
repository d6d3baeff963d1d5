"""Halves of encoder-decoders by themselves, against plain hooks and attention written out."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor

import biassurgery as bs
from biassurgery.adapters.halves import TYPES
from biassurgery.adapters.interface import attentions_in
from biassurgery.errors import SurgeryError, UnsupportedModel
from tests.state import untouched

CHANNEL = 7
LAYERS = 3
VALUE = 70000.0
HEADS = {"encoder": 4, "decoder": 8}
COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
OF_BART = {
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS["encoder"],
    "decoder_attention_heads": HEADS["decoder"],
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
}
OF_T5 = {"d_kv": 16, "d_ff": 96, "num_layers": LAYERS, "num_heads": 4}
OF_WHISPER = {
    **{name: value for name, value in OF_BART.items() if name != "max_position_embeddings"},
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 64,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
WITH_HEADS = [name for name in TYPES if "t5" not in name]


class Half(NamedTuple):
    whole: Any
    half: Any
    side: str


def whole(kind: str) -> Any:
    options = OF_T5 if "t5" in kind else OF_WHISPER if kind == "whisper" else OF_BART
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **COMMON, **options)
    auto = transformers.AutoModelForSeq2SeqLM
    if kind == "whisper":
        auto = transformers.AutoModelForSpeechSeq2Seq
    model: Any = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def half_of(kind: str, side: str) -> Half:
    model = whole(kind)
    half = model.get_encoder() if side == "encoder" else model.get_decoder()
    return Half(model, half, side)


def lists(half: Any) -> Any:
    return half.block if hasattr(half, "block") else half.layers


def batch_of(side: str, kind: str = "") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if (kind, side) == ("whisper", "encoder"):  # log-mel features, two frames a token
        return {"input_features": torch.randn(3, 8, 40, generator=generator)}
    ids = torch.randint(4, 64, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if side == "decoder":  # what an encoder has read
        batch["encoder_hidden_states"] = torch.randn(3, 5, 64, generator=generator)
    return batch


def output(half: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return half(**batch).last_hidden_state


def hooked(half: Any, batch: dict[str, Tensor], *, write: float | None = None) -> list[Tensor]:
    """What the blocks return, by plain hooks; the second with a value written at token 2."""
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, out: Any) -> Any:
        hidden = out if isinstance(out, Tensor) else out[0]
        if write is not None and len(seen) == 1:
            hidden[:, 2, CHANNEL] = write
        seen.append(hidden.clone())

    handles = [block.register_forward_hook(keep) for block in lists(half)]
    output(half, batch)
    for handle in handles:
        handle.remove()
    return seen


SIDES = [pytest.param(kind, side, id=f"{kind}-{side}") for kind in TYPES for side in HEADS]


@pytest.mark.parametrize(("kind", "side"), SIDES)
def test_measured_and_patched_as_it_runs(kind: str, side: str) -> None:
    _, half, _ = half_of(kind, side)
    batch = batch_of(side, kind)
    expected = hooked(half, batch)
    with untouched(half), bs.record(half, "block_output") as rec:
        output(half, batch)
    assert len(expected) == LAYERS
    assert all(torch.equal(rec["block_output"][i], seen) for i, seen in enumerate(expected))
    written = hooked(half, batch, write=VALUE)
    before = output(half, batch)
    options = {"channels": [CHANNEL], "positions": [2], "value": VALUE, "layers": [1]}
    with untouched(half), bs.patched(half, "set_value", **options):
        with bs.record(half, "block_output") as rec:
            after = output(half, batch)
        assert all(torch.equal(rec["block_output"][i], seen) for i, seen in enumerate(written))
        sites = bs.calibrate(half, batch)
        detection = bs.detect(half, batch)
    assert (after - before).abs().max() > 0.01
    assert {site.channel for site in sites if site.layer == 1} == {CHANNEL}
    (site,) = (site for site in sites if site.layer == 1)
    assert (site.role, site.count, round(site.mean)) == ("elsewhere", 3, VALUE)
    assert {site.layer for site in detection.sites} == {site.layer for site in sites}
    assert sites.measured_on["architecture"] == f"{kind}_{side}"


@pytest.mark.parametrize(("kind", "side"), [p for p in SIDES if p.values[0] in WITH_HEADS])
def test_modes_on_its_attention(kind: str, side: str) -> None:
    """One key and value more in every head of the self-attention, written out."""
    _, half, _ = half_of(kind, side)
    batch = batch_of(side, kind)
    batch.pop("attention_mask", None)
    before = output(half, batch)
    with untouched(half), bs.patched(half, "instrument"):
        torch.testing.assert_close(output(half, batch), before, rtol=1e-4, atol=1e-4)
    attention = half.layers[1].self_attn
    seen: list[tuple[Tensor, Tensor]] = []
    torch.manual_seed(3)
    with bs.patched(half, "attention_bias", kind="kv", init="normal", std=1.0):
        handle = attention.register_forward_hook(
            lambda module, args, kwargs, out: seen.append(
                ((args[0] if args else kwargs["hidden_states"]).clone(), out[0].clone())
            ),
            with_kwargs=True,
        )
        after = output(half, batch)
        handle.remove()
        bias = {
            name.rpartition(".")[2]: parameter.detach().clone()
            for name, parameter in attention.named_parameters()
            if name.endswith(("k_bias", "v_bias"))
        }
    assert not torch.equal(after, before)
    assert torch.equal(output(half, batch), before)
    (read, returned), heads = seen[0], HEADS[side]
    with torch.no_grad():
        q, k, v = (
            project(read).unflatten(-1, (heads, -1)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        logits = q @ k.mT
        if side == "decoder":
            logits = logits.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
        column = (q * bias["k_bias"][:, None]).sum(-1, keepdim=True)
        probs = (torch.cat([logits, column], -1) * q.shape[-1] ** -0.5).softmax(-1)
        heads_out = probs[..., :-1] @ v + probs[..., -1:] * bias["v_bias"][:, None]
        wanted = attention.out_proj(heads_out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(returned, wanted, rtol=1e-4, atol=1e-5)


T5S = [p for p in SIDES if p.values[0] not in WITH_HEADS]


@pytest.mark.parametrize(("kind", "side"), T5S)
def test_modes_on_attention_with_relative_positions(kind: str, side: str) -> None:
    """The same in T5, whose logits have no scale and a bias by distance, of the first block."""
    _, half, _ = half_of(kind, side)
    batch = batch_of(side, kind)
    before = output(half, batch)
    if not attentions_in(half.block[0].layer[0]):  # transformers 4
        with untouched(half), pytest.raises(UnsupportedModel, match="computes its softmax itself"):
            bs.patch_model(half, "attention_bias", kind="kv")
        return
    with untouched(half), bs.patched(half, "instrument"):
        torch.testing.assert_close(output(half, batch), before, rtol=1e-4, atol=1e-4)
    layer = 1
    attention = half.block[layer].layer[0].SelfAttention
    owner = attention if "umt5" in kind else half.block[0].layer[0].SelfAttention
    seen: list[tuple[Tensor, Tensor]] = []
    torch.manual_seed(3)
    with bs.patched(half, "attention_bias", kind="kv", init="normal", std=1.0):
        handle = attention.register_forward_hook(
            lambda module, args, kwargs, out: seen.append(
                ((args[0] if args else kwargs["hidden_states"]).clone(), out[0].clone())
            ),
            with_kwargs=True,
        )
        after = output(half, batch)
        handle.remove()
        bias = {
            name.rpartition(".")[2]: parameter.detach().clone()
            for name, parameter in attention.named_parameters()
            if name.endswith(("k_bias", "v_bias"))
        }
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(output(half, batch), before)
    read, returned = seen[0]
    with torch.no_grad():
        q, k, v = (
            project(read).unflatten(-1, (4, 16)).transpose(1, 2)
            for project in (attention.q, attention.k, attention.v)
        )
        away = torch.arange(12)[None] - torch.arange(12)[:, None]
        logits = q @ k.mT + owner.relative_attention_bias.weight[buckets(away, side)].permute(
            2, 0, 1
        )
        hidden = batch["attention_mask"][:, None, None] == 0
        if side == "decoder":
            hidden = hidden | (away > 0)
        column = (q * bias["k_bias"][:, None]).sum(-1, keepdim=True)
        probs = torch.cat([logits.masked_fill(hidden, -torch.inf), column], -1).softmax(-1)
        heads_out = probs[..., :-1] @ v + probs[..., -1:] * bias["v_bias"][:, None]
        wanted = attention.o(heads_out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(returned, wanted, rtol=1e-4, atol=1e-5)


def buckets(away: Tensor, side: str) -> Tensor:
    """Distances below 8 (both ways) or 16 (back only) have a bucket each: so short is the text."""
    if side == "decoder":
        return (-away).clamp(min=0)
    near = away.abs()
    # 8 of the 16 buckets a way are exact; then, on a log scale up to 128, the other 8.
    far = 8 + (8 * (near.clamp(min=8) / 8).log() / math.log(128 / 8)).long()
    return torch.where(near < 8, near, far) + 16 * (away > 0)


def test_gradients_of_relative_positions_pass_through_the_core() -> None:
    """No fused kernel gives a gradient of what is added to the logits."""
    model, half, _ = half_of("t5", "encoder")
    ids = batch_of("encoder")["input_ids"]

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {name: grad.clone() for name, grad in found.items()}

    plain = gradients()
    names = [name for name in plain if "encoder" in name and "relative_attention_bias" in name]
    assert names
    assert all(plain[name].abs().max() > 0 for name in names)
    if not attentions_in(half.block[0].layer[0]):  # transformers 4
        return
    with bs.patched(half, "instrument"):
        patched = gradients()
    assert plain.keys() == patched.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(patched[name], grad, rtol=1e-4, atol=1e-6)


def test_the_encoder_of_whisper_reads_sound() -> None:
    """Every token is one of the sequence; what text or images have is refused with its reason."""
    model, half, _ = half_of("whisper", "encoder")
    batch = batch_of("encoder", "whisper")
    options = {"channels": [CHANNEL], "positions": [0], "value": VALUE, "layers": [0]}
    with bs.patched(half, "set_value", **options):
        sites = bs.calibrate(half, batch["input_features"])
        detection = bs.detect(half, batch)
    assert {(s.layer, s.channel, s.role, s.count) for s in sites} == {
        (layer, CHANNEL, "start", 3) for layer in range(LAYERS)
    }
    assert detection.tokens == 3 * 20
    (first,) = {(p.position, p.count) for p in detection.positions if p.layer == 0}
    assert first == (0, 3)
    with bs.record(half, ("sink_mass", "probs")) as rec:
        output(half, batch)
    assert torch.allclose(rec["sink_mass"][1], rec["probs"][1][..., 0], atol=1e-6)
    assert detection.sinks is not None
    on_start = rec["probs"][0][:, :, 1:, 0].mean((0, 2))  # block 0 reads what no patch has changed
    assert detection.sinks.layers[0].attention == pytest.approx(on_start.tolist(), rel=1e-4)
    with bs.patched(half, "set_value", **options), bs.patched(half, "set_zero", sites=sites):
        with bs.record(half, "block_output") as rec:
            model.generate(input_features=batch["input_features"], max_new_tokens=2)
        assert (rec["block_output"][0][:, 0, CHANNEL] == 0).all()
    for action, reason in (
        (lambda: bs.calibrate_key_values(half, batch), "reads sound"),
        (lambda: bs.perplexity(half, batch), "reads sound"),
        (lambda: bs.calibrate(half, batch, tower="text"), "'audio'"),
        (lambda: bs.calibrate(half, batch["input_features"][0]), "B, mels, frames"),
        (lambda: bs.patch_model(half, "set_mean"), "of which none is packaged"),
        (lambda: bs.calibrate(half, batch_of("encoder")), "'input_features'"),
    ):
        with untouched(half), pytest.raises(SurgeryError, match=reason):
            action()


def test_other_readers_of_sound_are_refused_with_the_reason() -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(2, 2),
        conv_kernel=(3, 3),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    model = transformers.Wav2Vec2Model(config).eval()
    with untouched(model), pytest.raises(UnsupportedModel, match="reads input_values"):
        bs.calibrate(model, torch.randn(2, 400))
    heads = transformers.WhisperForAudioClassification(whole("whisper").config)
    with untouched(heads), pytest.raises(UnsupportedModel, match="one half of"):
        bs.calibrate(heads, batch_of("encoder", "whisper"))


@pytest.mark.parametrize("kind", TYPES)
def test_the_whole_is_refused_with_its_own_halves(kind: str) -> None:
    model = whole(kind)
    with untouched(model), pytest.raises(UnsupportedModel, match="read different things") as raised:
        bs.calibrate(model, batch_of("encoder"))
    assert "model.get_encoder()" in str(raised.value)
    assert "model.get_decoder()" in str(raised.value)


def test_a_patch_of_a_half_acts_in_the_whole() -> None:
    model, half, _ = half_of("bart", "encoder")
    ids = batch_of("encoder")["input_ids"]

    def logits() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits

    before = logits()
    options = {"channels": [CHANNEL], "positions": [2], "value": VALUE, "layers": [1]}
    with bs.patched(half, "set_value", **options):
        assert (logits() - before).abs().max() > 1e-3
    assert torch.equal(logits(), before)


def test_what_halves_do_not_have() -> None:
    _, encoder, _ = half_of("t5", "encoder")
    _, decoder, _ = half_of("bart", "decoder")
    for half, side in ((encoder, "encoder"), (decoder, "decoder")):
        batch = batch_of(side)
        with untouched(half), pytest.raises(SurgeryError, match=r"directions|attention|positions"):
            bs.calibrate_key_values(half, batch)
        with untouched(half), pytest.raises(UnsupportedModel, match=r"no logits|directions"):
            bs.perplexity(half, batch)


def test_albert_is_told_how_to_untie() -> None:
    config = transformers.AlbertConfig(
        vocab_size=64,
        embedding_size=16,
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=96,
    )
    torch.manual_seed(0)
    model = transformers.AlbertModel(config).eval()
    batch = batch_of("encoder")
    before = output(model, batch)
    with untouched(model), pytest.raises(UnsupportedModel, match="num_hidden_groups"):
        bs.calibrate(model, batch)
    groups = model.encoder.albert_layer_groups
    groups.extend(copy.deepcopy(groups[0]) for _ in range(LAYERS - 1))
    model.config.num_hidden_groups = LAYERS
    assert torch.equal(output(model, batch), before)
    seen: list[Tensor] = []
    groups[1].register_forward_hook(
        lambda module, args, out: seen.append(out if isinstance(out, Tensor) else out[0])
    )
    with bs.record(model, "block_output") as rec:
        output(model, batch)
    assert torch.equal(rec["block_output"][1], seen[0])
