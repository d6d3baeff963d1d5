"""`rescale` beyond the battery: what it serves and refuses, its factor, findings, interruptions."""

from __future__ import annotations

import copy
import warnings
from contextlib import suppress
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import biassurgery as bs
from biassurgery.errors import BadOption, CalibrationRequired, Incompatible, UnsupportedModel
from biassurgery.surgery.rescale import RescaleEdit
from tests import encoders, models, vision
from tests.models import CHANNEL, LAYER, VOCAB
from tests.state import output_of, untouched

IDS = models.tokens(rows=2, length=12)
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def build(name: str, **options: Any) -> Any:
    """A random model whose norms have weights of their own."""
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SMALL | options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def streams(model: Any) -> list[Tensor]:
    with torch.no_grad():
        states = model(IDS, use_cache=False, output_hidden_states=True).hidden_states
    return list(states[:-1])  # the last one is normed


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Gemma3TextConfig", {"sliding_window": 8}),
        ("Gemma2Config", {"sliding_window": 8}),
        ("Qwen3Config", {"tie_word_embeddings": False}),
        ("Qwen3Config", {"tie_word_embeddings": True}),
        ("BloomConfig", {"n_layer": 3, "n_head": 4}),
        ("Phi3Config", {}),
        ("GraniteConfig", {"residual_multiplier": 0.3, "embedding_multiplier": 5.0}),
        ("CohereConfig", {}),
        ("Glm4Config", {"partial_rotary_factor": 1.0}),
        (
            "Qwen3MoeConfig",
            {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_way_into_the_stream(name: str, options: dict[str, Any]) -> None:
    """Post-norms of 1 + w, norms behind the embedding, multipliers, experts that no token chose."""
    model = build(name, **options)
    before, logits = streams(model), output_of(model, IDS)
    with untouched(model, IDS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eps of a saved checkpoint
        bs.patch_model(model, "rescale", factor=2.0**-4)
        for old, new in zip(before, streams(model), strict=True):
            torch.testing.assert_close(new, old * 2.0**-4, rtol=1e-4, atol=1e-5)
        others = torch.arange(VOCAB)[None]  # other experts than those of the trial
        after = output_of(model, others)
        torch.testing.assert_close(output_of(model, IDS), logits, rtol=1e-4, atol=1e-4)
        bs.unpatch_model(model)
    torch.testing.assert_close(after, output_of(model, others), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Olmo2Config", "Gemma3nTextConfig", "BertLMHeadModel"])
def test_blocks_that_read_the_raw_stream_are_refused(name: str) -> None:
    if name == "BertLMHeadModel":
        config = transformers.BertConfig(**SMALL, is_decoder=True)
        model: Any = transformers.BertLMHeadModel(config).eval()
    elif name == "Gemma3nTextConfig":
        sizes = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8}
        more = {
            "laurel_rank": 4,
            "num_kv_shared_layers": 0,
            "layer_types": ["full_attention"] * 5,
            "num_hidden_layers": 5,
        }
        activation = {"activation_sparsity_pattern": [0.0] * 5}
        model = build(name, **sizes, **more, **activation)
    else:
        model = build(name)
    with untouched(model, IDS), pytest.raises(UnsupportedModel, match="residual stream"):
        bs.patch_model(model, "rescale", factor=0.25)


def test_norms_of_one_plus_w_are_refused_in_bfloat16() -> None:
    model = build("Gemma3TextConfig").bfloat16()
    with untouched(model, IDS), pytest.raises(UnsupportedModel, match="1 \\+ w"):
        bs.patch_model(model, "rescale", factor=0.25)


def test_float16_is_refused() -> None:
    model = models.planted("llama", torch.float16)
    with untouched(model, IDS), pytest.raises(UnsupportedModel, match="float16"):
        bs.patch_model(model, "rescale", factor=0.25)


def test_lora_on_what_is_scaled_is_refused() -> None:
    peft = pytest.importorskip("peft")
    for target, refused in (("o_proj", True), ("q_proj", False)):
        config = peft.LoraConfig(target_modules=[target], r=2, init_lora_weights=False)
        model = peft.get_peft_model(models.planted("llama"), config).eval()
        before = output_of(model, IDS)
        if refused:
            with untouched(model, IDS), pytest.raises(UnsupportedModel, match="PEFT"):
                bs.patch_model(model, "rescale", factor=0.25)
            continue
        bs.patch_model(model, "rescale", factor=0.25)
        torch.testing.assert_close(output_of(model, IDS), before, rtol=1e-4, atol=1e-4)


def test_lora_that_has_come_since_stays_with_the_stream_it_was_trained_on() -> None:
    """What it writes is not among what is divided: it has to be merged, or go, first."""
    peft = pytest.importorskip("peft")
    model = bs.patch_model(models.planted("llama"), "rescale", factor=0.25)
    config = peft.LoraConfig(target_modules=["o_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    trained = output_of(adapted, IDS)
    with untouched(adapted, IDS), pytest.raises(UnsupportedModel, match="merge_and_unload"):
        bs.unpatch_model(adapted)
    merged = adapted.merge_and_unload()
    bs.unpatch_model(merged)
    torch.testing.assert_close(output_of(merged, IDS), trained, rtol=1e-4, atol=1e-4)


def test_a_half_of_an_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )
    encoder = transformers.T5ForConditionalGeneration(config).eval().get_encoder()
    with untouched(encoder), pytest.raises(UnsupportedModel, match="other half"):
        bs.patch_model(encoder, "rescale", factor=0.25)


@pytest.mark.parametrize(
    "factor", [0.0, -0.5, 0.3, 1.0, 1, True, float("nan"), float("inf"), "big"]
)
def test_factors_that_are_no_powers_of_two_are_refused(factor: Any) -> None:
    with pytest.raises(BadOption, match="factor"):
        bs.modes.Rescale(factor)


def overflowing() -> Any:
    """A planted LLaMA whose delimiter has 90,000 in the stream, beyond float16."""
    model = models.planted("llama")
    model.model.layers[LAYER].mlp.down_proj.weight.data[CHANNEL] *= 10
    return model


def test_in_inference_mode() -> None:
    """Where there is no graph to find the weights by, unless it is left for that."""
    model = build("LlamaConfig")
    before = output_of(model, IDS)
    with torch.inference_mode():
        bs.patch_model(model, "rescale", factor=0.25)
    assert torch.equal(output_of(model, IDS), before)  # a power of two, and norms in between
    assert streams(model)[0].std() < 0.1 < before.std()
    bs.unpatch_model(model)
    assert torch.equal(output_of(model, IDS), before)
    with torch.inference_mode():
        made_there = build("LlamaConfig")
    with pytest.raises(UnsupportedModel, match="inference_mode"):
        bs.patch_model(made_there, "rescale", factor=0.25)


def test_auto_takes_the_mildest_factor_with_room_and_then_float16_holds_it() -> None:
    model = overflowing()
    batch = models.tokens(4, 24)
    largest = max(state.abs().max().item() for state in streams_of(model, batch))
    assert 65504 < largest < 2 * 65504
    logits = output_of(model, batch)
    assert not output_of(copy.deepcopy(model).half(), batch).isfinite().all()
    bs.patch_model(model, "rescale", batches=batch)
    assert bs.patches(model)[0].mode.factor == 0.25  # 90,000 / 2 is not below 65,504 / 2
    found = output_of(model.half(), batch).float()
    assert found.isfinite().all()
    assert (found - logits).abs().max() < 0.02 * logits.abs().max()


def streams_of(model: Any, batch: Tensor) -> list[Tensor]:
    with torch.no_grad():
        states = model(batch, use_cache=False, output_hidden_states=True).hidden_states
    return list(states[:-1])


def test_auto_reads_a_diagnosis() -> None:
    model = overflowing()
    found = bs.diagnose(model, models.tokens(4, 24))
    assert found.float16.largest > 65504
    bs.patch_model(model, "rescale", diagnosis=found)
    assert bs.patches(model)[0].mode.factor == 0.25


def test_a_diagnosis_is_read_in_its_own_units_and_of_this_model_only() -> None:
    model = overflowing()
    with bs.patched(model, "rescale", factor=2.0**-8):
        smaller = bs.diagnose(model, models.tokens(4, 24))
    assert smaller.float16.largest < 65504 / 2
    bs.patch_model(model, "rescale", diagnosis=smaller)
    assert bs.patches(model)[0].mode.factor == 0.25
    other = models.planted("gpt2")
    with untouched(other, IDS):
        with pytest.raises(Incompatible, match="architecture"):
            bs.patch_model(other, "rescale", diagnosis=smaller)
        with pytest.raises(BadOption, match="diagnosis: str"):
            bs.patch_model(other, "rescale", diagnosis="diagnosis.json")


def test_auto_says_so_where_there_is_nothing_to_do_or_nothing_to_measure_on() -> None:
    model = models.planted("llama")
    with untouched(model, IDS):
        with pytest.raises(BadOption, match="nothing needs to be smaller"):
            bs.patch_model(model, "rescale", batches=IDS)
        with pytest.raises(CalibrationRequired, match="batches="):
            bs.patch_model(model, "rescale")


def test_what_overflows_inside_a_branch_is_said() -> None:
    model = models.planted("llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight.data *= 1e6
    mlp.down_proj.weight.data *= 1e-6
    with pytest.warns(UserWarning, match=r"model\.layers\.0\.mlp\.\w+_proj.* inside a branch"):
        bs.patch_model(model, "rescale", factor=0.25)


def test_sites_are_converted_and_loose_ones_refused() -> None:
    """`set_mean` on the rescaled model, with sites of the one before, says what it said there."""
    model = models.planted("llama")
    sites = bs.calibrate(model, models.tokens(4))
    sites = bs.Sites([*sites], origin=sites.origin)
    halved = bs.Sites([s.times(0.5) for s in sites], origin=sites.origin)  # so that it matters
    with bs.patched(model, "set_mean", sites=halved, layers=LAYER):
        wanted = output_of(model, IDS)
    bs.patch_model(model, "rescale", factor=0.25)
    with pytest.warns(UserWarning, match="converted"):
        bs.patch_model(model, "set_mean", sites=halved, layers=LAYER)
    torch.testing.assert_close(output_of(model, IDS), wanted, rtol=1e-4, atol=1e-4)
    with untouched(model, IDS), pytest.raises(BadOption, match="made for"):
        bs.unpatch_model(model, "rescale")
    bs.unpatch_model(model, "set_mean")
    with untouched(model, IDS), pytest.raises(Incompatible, match="origin="):
        bs.patch_model(model, "set_mean", sites=[*sites])
    with pytest.warns(UserWarning, match="rescaled by 0.25"):
        again = bs.calibrate(model, models.tokens(4))
    assert again.origin.factor == 0.25
    means = {(s.layer, s.role): s.mean for s in sites}
    for site in again:
        assert site.mean == pytest.approx(means[site.layer, site.role] / 4, rel=1e-5)
    with pytest.raises(Incompatible, match="factor"):
        again + bs.calibrate(models.planted("llama"), models.tokens(4))


def test_the_factor_is_kept_in_files(tmp_path) -> None:
    sites = bs.Sites([bs.Site(1, 7, "start", 100.0)], origin=bs.Origin("llama", factor=0.25))
    sites.save(tmp_path / "sites")
    assert bs.Sites.load(tmp_path / "sites") == sites
    means = bs.RegisterMeans(torch.ones(2, 3, 4), factor=0.5)
    means.save(tmp_path / "means")
    loaded = bs.RegisterMeans.load(tmp_path / "means")
    assert loaded.factor == 0.5
    assert loaded.of_factor(2.0).values.equal(4 * torch.ones(2, 3, 4))


def test_register_means_are_converted() -> None:
    batch = models.images(3)
    model = vision.planted("dinov2_with_registers")
    means = bs.calibrate_registers(model, models.images(4, seed=7))
    with bs.patched(model, "fix_registers", means=means):
        wanted = output_of(model, batch)
    bs.patch_model(model, "rescale", factor=0.25, batches=batch)
    with pytest.warns(UserWarning, match="means.*converted"):
        bs.patch_model(model, "fix_registers", means=means)
    torch.testing.assert_close(output_of(model, batch), wanted, rtol=1e-4, atol=1e-4)


def test_a_patch_made_for_the_stream_as_it_was_is_in_the_way() -> None:
    model = models.planted("llama")
    bs.patch_model(model, "set_mean", sites=bs.calibrate(model, models.tokens(4)))
    with untouched(model, IDS), pytest.raises(BadOption, match="'set_mean' is on the model"):
        bs.patch_model(model, "rescale", factor=0.25)


def test_key_values_are_those_of_both() -> None:
    """Keys and values are behind norms: what was measured before is as right after."""
    model = models.planted("llama")
    batch = models.tokens(4, 12)
    before = bs.calibrate_key_values(model, batch)
    bs.patch_model(model, "rescale", factor=0.25)
    after = bs.calibrate_key_values(model, batch)
    torch.testing.assert_close(after.keys, before.keys, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.values, before.values, rtol=1e-4, atol=1e-5)


def test_record_says_that_hidden_states_are_smaller() -> None:
    model = models.planted("llama")
    bs.patch_model(model, "rescale", factor=0.25)
    with pytest.warns(UserWarning, match="rescaled by 0.25"), bs.record(model, "block_output"):
        pass
    with warnings.catch_warnings(), bs.record(model, "sink_mass"):
        warnings.simplefilter("error")


class Interrupted(BaseException):
    """What Ctrl-C is like."""


@pytest.mark.parametrize("at", range(12))
@pytest.mark.parametrize("method", ["_multiply", "_give_back"])
def test_interrupted_at_any_weight(method: str, at: int, monkeypatch) -> None:
    """On the way on nothing is left of it; on the way off the next call goes to the end."""
    model = models.planted("llama")
    plain = copy.deepcopy(model.state_dict())
    original = getattr(RescaleEdit, method)
    calls: list[int] = []

    def failing(self: Any, parameter: Any, weight: Any) -> None:
        calls.append(1)
        if len(calls) == at + 1:
            raise Interrupted
        original(self, parameter, weight)

    def use() -> None:
        bs.patch_model(model, "rescale", factor=0.25)
        bs.unpatch_model(model)

    with monkeypatch.context() as patching:
        patching.setattr(RescaleEdit, method, failing)
        with suppress(Interrupted):
            use()
    if bs.patches(model):
        bs.unpatch_model(model)
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())
    assert model.config.rms_norm_eps == model.model.norm.variance_epsilon == 1e-6


def test_numbers_too_small_to_be_divided_are_kept() -> None:
    model = models.planted("llama")
    tiny = torch.finfo(torch.float32).smallest_normal * 1.5
    model.model.layers[0].self_attn.o_proj.weight.data[0] = tiny  # times 2^-6 it loses digits
    with untouched(model, IDS):
        bs.patch_model(model, "rescale", factor=2.0**-6)
        bs.unpatch_model(model)


def test_weights_that_were_trained_meanwhile_keep_that() -> None:
    model = models.planted("llama")
    weight = model.model.layers[0].mlp.down_proj.weight
    before = weight.detach().clone()
    bs.patch_model(model, "rescale", factor=0.25)
    with torch.no_grad():
        weight.add_(1.0)
    bs.unpatch_model(model)
    torch.testing.assert_close(weight.detach(), before + 4)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_encoders_whose_blocks_read_the_stream_itself_are_refused(family: str) -> None:
    """BERT's norms stand behind the sum; ModernBERT's first block has none in front."""
    model = encoders.planted(family)
    with untouched(model, IDS), pytest.raises(UnsupportedModel, match="behind block 0"):
        bs.patch_model(model, "rescale", factor=0.25)


@pytest.mark.parametrize("name", ["LlamaConfig", "GPT2Config", "Gemma3TextConfig"])
def test_weights_from_before_it_was_rescaled_are_not_loaded(name: str) -> None:
    model = build(name)
    original = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    bs.patch_model(model, "rescale", factor=0.25)
    trained = {key: tensor * 1.05 for key, tensor in model.state_dict().items()}
    with untouched(model, IDS), pytest.raises(UnsupportedModel, match=r"state_dict: .* 0\.25"):
        model.load_state_dict(original)
    model.load_state_dict(trained)  # of the rescaled model, some steps later
    assert all(torch.equal(tensor, trained[key]) for key, tensor in model.state_dict().items())
    bs.unpatch_model(model)
    model.load_state_dict(original)
    assert all(torch.equal(tensor, original[key]) for key, tensor in model.state_dict().items())
