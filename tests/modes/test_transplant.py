"""On a really trained model with sinks, the packaged checkpoint: the start token leaves, its
function stays.
"""

from __future__ import annotations

import pytest
import torch

import biassurgery as bs
from biassurgery.cli.demo import MIN_RATIO, load_demo_model
from biassurgery.data.packaged import packaged_text, text_batches
from biassurgery.errors import FileError, Incompatible, UnsupportedModel
from biassurgery.evaluate import streaming_perplexity
from tests.models import FAMILIES, LAYERS, planted, tokens
from tests.state import untouched


@pytest.fixture(scope="module")
def texts():
    """The model, the calibration batches, and the evaluation batches (B, 32), each sequence behind
    the start token.
    """
    model, tokenizer = load_demo_model()
    length = model.config.max_position_embeddings
    return model, *(
        text_batches(tokenizer, packaged_text(name), length)
        for name in ("calibration", "evaluation")
    )


def counted(batch):
    """A batch whose loss counts the tokens that are predicted with and without the start token:
    from the third one on.
    """
    labels = batch.clone()
    labels[:, 1] = -100
    return {"input_ids": batch, "labels": labels}


def test_perplexity_stays_and_the_massive_activations_are_gone(texts):
    model, calibration, evaluation = texts
    with_start = [counted(batch) for batch in evaluation]
    without = [batch[:, 1:] for batch in evaluation]
    original = bs.perplexity(model, with_start)
    found = bs.detect(model, calibration, min_ratio=MIN_RATIO)
    assert len(found.sites) > 0
    assert bs.perplexity(model, without) > 1.5 * original  # cut off, the token is missed
    with bs.patched(model, "set_zero", sites=found.sites):
        assert bs.perplexity(model, with_start) > 1.5 * original
    key_values = bs.calibrate_key_values(model, calibration)
    assert key_values.spread == 0.0
    with untouched(model, evaluation[0]), bs.patched(model, "transplant", key_values=key_values):
        assert bs.perplexity(model, without) == pytest.approx(original, rel=1e-3)
        after = bs.detect(model, [batch[:, 1:] for batch in calibration], min_ratio=MIN_RATIO)
    assert len(after.sites) == 0
    for before, left in zip(found.layers, after.layers):
        assert left.top[0] < before.top[0] / 5  # no other token takes over


def test_a_start_token_that_varies_is_an_approximation_and_says_so(texts):
    model, calibration, evaluation = texts
    key_values = bs.calibrate_key_values(model, [batch[:, 1:] for batch in calibration])
    assert key_values.spread > 0.1
    with (
        pytest.warns(UserWarning, match="not a constant"),
        bs.patched(model, "transplant", key_values=key_values),
    ):
        assert bs.perplexity(model, [batch[:, 2:] for batch in evaluation[:4]]) < 100


def test_key_values_are_means_over_sequences_and_merge():
    """Against keys and values that the model's own cache holds."""
    model = planted("llama")
    parts = [tokens(3, seed=1), tokens(2, seed=2)]
    for row, part in enumerate(parts):
        part[:, 0] = torch.arange(5, 5 + len(part)) + 10 * row  # start tokens that differ
    merged = bs.calibrate_key_values(model, parts[0]) + bs.calibrate_key_values(model, parts[1])
    both = bs.calibrate_key_values(model, parts)
    with torch.no_grad():
        caches = [model(part).past_key_values for part in parts]
    for layer in range(LAYERS):
        for name in ("keys", "values"):
            truth = torch.cat(
                [getattr(cache.layers[layer], name)[:, :, 0] for cache in caches]
            ).double()
            for found in (merged, both):
                std = getattr(found, f"{name[:-1]}_std")[layer]
                torch.testing.assert_close(
                    getattr(found, name)[layer].double(), truth.mean(0), rtol=1e-5, atol=1e-6
                )
                torch.testing.assert_close(
                    std.double(), truth.std(0, correction=0), rtol=1e-4, atol=1e-5
                )
    assert merged.count == both.count == 5


def test_key_values_are_saved_and_loaded(tmp_path):
    found = bs.calibrate_key_values(planted("gpt2"), tokens())
    found.save(tmp_path / "kv.safetensors")
    again = bs.KeyValues.load(tmp_path / "kv.safetensors")
    assert torch.equal(again.keys, found.keys)
    assert torch.equal(again.values, found.values)
    assert (again.count, again.architecture, again.spread) == (found.count, "gpt2", 0.0)
    with pytest.raises(Incompatible, match="architecture"):
        found + bs.calibrate_key_values(planted("llama"), tokens())
    with pytest.raises(FileError, match="key values"):
        bs.KeyValues.load(_sites_file(tmp_path))


def _sites_file(folder):
    bs.calibrate(planted("llama"), tokens()).save(folder / "sites.safetensors")
    return folder / "sites.safetensors"


def test_left_padding_counts_the_first_real_token():
    model = planted("llama")
    ids = tokens(2)
    padded = torch.cat([torch.full((2, 3), 95), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    plain = bs.calibrate_key_values(model, ids)
    found = bs.calibrate_key_values(model, {"input_ids": padded, "attention_mask": mask})
    torch.testing.assert_close(found.keys, plain.keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.values, plain.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["falcon_h1", "diffllama"])
def test_an_architecture_whose_start_token_acts_otherwise_is_refused(model_type):
    """Falcon-H1 hands it on in a recurrent state too; DiffLlama subtracts one attention from
    another.
    """
    from tests.census.tiny import tiny_model

    model = tiny_model(model_type)
    ids = torch.randint(5, 60, (2, 8))
    with (
        untouched(model),
        pytest.raises(UnsupportedModel, match=r"more than its keys and values|recurrent|expected"),
    ):
        bs.calibrate_key_values(model, ids)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "falcon", "phi", "gpt_neox"])
def test_a_stream_of_any_length_needs_no_sink(family):
    """A window behind a transplanted start token says what the same window beside the kept token
    says, far past its length.
    """
    model = planted(family)
    ids = tokens(1, 40)
    window = 8
    key_values = bs.calibrate_key_values(model, tokens())

    def stream(ids, cache):
        return torch.cat(
            [model(token, past_key_values=cache).logits for token in ids.split(1, 1)], 1
        )

    wanted = stream(ids, bs.SinkCache(model, window + 1, sinks=1))[:, 1:]
    without = stream(ids, bs.SinkCache(model, window, sinks=0))[:, 1:]
    with bs.patched(model, "transplant", key_values=key_values):
        found = stream(ids[:, 1:], bs.SinkCache(model, window, sinks=0))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (without - wanted)[:, window:].abs().max() > 100 * (found - wanted).abs().max()


def test_a_stream_keeps_its_perplexity_with_the_sink_or_with_the_transplant(texts):
    model, calibration, evaluation = texts
    window = 16
    start = evaluation[0][:1, 0]
    stream = torch.cat([batch[:, 1:].flatten() for batch in evaluation])[:400]
    with_start = torch.cat([start, stream])
    sink = streaming_perplexity(
        model, with_start, bs.SinkCache(model, window + 1, sinks=1), skip=window + 1
    )
    plain = streaming_perplexity(
        model, with_start, bs.SinkCache(model, window, sinks=0), skip=window + 1
    )
    with bs.patched(model, "transplant", key_values=bs.calibrate_key_values(model, calibration)):
        transplanted = streaming_perplexity(
            model, stream, bs.SinkCache(model, window, sinks=0), skip=window
        )
    assert transplanted == pytest.approx(sink, rel=1e-4)
    assert plain > 1.3 * sink


def padded(ids, padding):
    """The arguments for rows with padding on the left, without position ids."""
    ids = torch.cat([torch.full((len(ids), padding), 95), ids], 1)
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_transplant_counts_from_the_first_real_token(family):
    """Also where the mask comes without position ids: padding would put the tokens too far from
    k'.
    """
    model = planted(family)
    ids = tokens(2)
    wanted = model(ids, use_cache=False).logits[:, 1:]
    with bs.patched(model, "transplant", key_values=bs.calibrate_key_values(model, tokens(3))):
        found = model(**padded(ids[:, 1:], 5)).logits[:, 5:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_transplant_counts_alike_where_the_mask_is_as_wide_as_a_static_cache():
    """Its last columns are of tokens that have not been read yet."""
    import transformers as tf

    model = planted("llama")
    ids = tokens(2)
    wanted = model(ids, use_cache=False).logits[:, 1:]
    cache = tf.StaticCache(config=model.config, max_cache_len=32)
    mask = torch.ones(2, 32, dtype=torch.long)
    with bs.patched(model, "transplant", key_values=bs.calibrate_key_values(model, tokens(3))):
        found = [
            model(part, attention_mask=mask, past_key_values=cache).logits
            for part in ids[:, 1:].split([5, 1, ids.shape[1] - 7], 1)
        ]
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-4, atol=1e-4)


def test_the_transplanted_logit_is_capped_as_the_tokens_was():
    import transformers as tf

    config = tf.Gemma2Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attn_logit_softcapping=2.0,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = tf.Gemma2ForCausalLM(config).eval()
    ids = tokens()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
        wanted = model(ids, use_cache=False).logits[:, 1:]
        with bs.patched(model, "transplant", key_values=bs.calibrate_key_values(model, tokens(2))):
            torch.testing.assert_close(
                model(ids[:, 1:], use_cache=False).logits, wanted, rtol=1e-4, atol=1e-4
            )
