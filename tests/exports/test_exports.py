"""Every format runs in a process that does not import this library, and says the same there."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

import biassurgery as bs
from biassurgery.errors import BadOption, FileError, MissingPackage, UnsupportedModel
from tests import models
from tests.models import PAD_ID, START_ID
from tests.state import output_of, untouched

ROWS, LENGTH, NEW = 2, 9, 5
HAS_SINKS = Version(version("transformers")) >= Version("5.15")
if HAS_SINKS:
    from transformers import GraniteSWAForCausalLM


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (2, 9) without a start token, the first row left-padded by three, and the mask."""
    ids = models.tokens(ROWS, LENGTH, seed=4, delimiter_at=None)
    ids[:, 0] = 50
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ids[0, :3] = PAD_ID
    return ids, mask


def in_another_process(folder: Path, program: str) -> Any:
    """Run a program that saves something to `result`; it must not import this library."""
    result = folder / "result.pt"
    preamble = f"""
        import sys, torch
        torch.set_num_threads(1)
        folder, result = {str(folder)!r}, {str(result)!r}
        ids, mask = torch.load(folder + "/text.pt")
    """
    end = """
        assert not any(name.split(".")[0] == "biassurgery" for name in sys.modules)
    """
    code = textwrap.dedent(preamble) + textwrap.dedent(program) + textwrap.dedent(end)
    torch.save(text(), folder / "text.pt")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Passing `generation_config`" not in done.stderr  # with options: deprecated
    return torch.load(result)


def wanted(model: Any) -> tuple[list[torch.Tensor], list[Any], list[Any]]:
    """Of each row alone, behind its start token: logits, greedy and beam continuations."""
    ids, mask = text()
    logits, greedy, beams = [], [], []
    for row in range(ROWS):
        alone = ids[row, mask[row].bool()]
        whole = torch.cat([torch.tensor([START_ID]), alone])[None]
        with torch.no_grad():
            logits.append(model(whole).logits[0, 1:])
        for options, found in (({}, greedy), ({"num_beams": 3}, beams)):
            sequence = model.generate(
                whole,
                attention_mask=torch.ones_like(whole),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
                **options,
            )
            found.append(sequence[0, 1:].tolist())
    return logits, greedy, beams


@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(f, marks=pytest.mark.long) for f in ("gpt2", "falcon_alibi"))],
)
def test_prefix(family: str, tmp_path: Path) -> None:
    """Logits, generation, masks of the text's length, left padding, several rows, beams."""
    model = models.planted(family)
    logits, greedy, beams = wanted(model)
    model.save_pretrained(tmp_path / "model")
    key_values = bs.calibrate_key_values(model, models.tokens(4, 12))
    with bs.patched(model, "transplant", key_values=key_values):
        bs.export(model, tmp_path / "out", format="prefix")
    found = in_another_process(
        tmp_path / "out",
        f"""
        sys.path.insert(0, folder)
        from prefix import Prefix
        from transformers import AutoModelForCausalLM, GenerationConfig
        model = AutoModelForCausalLM.from_pretrained(folder + "/../model").eval()
        prefix = Prefix.load(folder)
        options = dict(max_new_tokens={NEW}, do_sample=False, eos_token_id=None)
        with torch.no_grad():
            logits = model(**prefix.inputs(model, ids, mask)).logits
            unmasked = model(**prefix.inputs(model, ids[1:])).logits
        greedy = prefix.generate(model, ids, mask, **options)
        beams = prefix.generate(model, ids, mask, num_beams=3, **options)
        config = GenerationConfig(num_beams=3, max_length=ids.shape[1] + {NEW}, eos_token_id=None)
        configured = prefix.generate(model, ids, mask, generation_config=config)
        torch.save((logits, unmasked, greedy, beams, configured), result)
        """,
    )
    _, mask = text()
    for row in range(ROWS):
        real = mask[row].bool()
        torch.testing.assert_close(found[0][row, real], logits[row], rtol=1e-3, atol=2e-3)
        start = int((mask[row] == 0).sum())
        assert found[2][row, start:].tolist() == greedy[row]
        assert found[3][row, start:].tolist() == beams[row]
        assert found[4][row, start:].tolist() == beams[row]
    torch.testing.assert_close(found[1][0], logits[1], rtol=1e-3, atol=2e-3)
    with torch.no_grad():
        dropped = model(text()[0][1:]).logits[0]
    assert (dropped - logits[1]).abs().max() > 0.05  # without the prefix it says something else


@pytest.mark.long
def test_cartridge(tmp_path: Path) -> None:
    """PEFT's forward runs it; its generate drops the prefix where the export's warning says so."""
    peft = pytest.importorskip("peft")
    model = models.planted("llama")
    logits, greedy, _ = wanted(model)
    model.save_pretrained(tmp_path / "model")
    key_values = bs.calibrate_key_values(model, models.tokens(4, 12))
    with pytest.warns(UserWarning, match="generate"):
        bs.export(model, tmp_path / "out", format="cartridge", key_values=key_values)
    found, generated, plain = in_another_process(
        tmp_path / "out",
        f"""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(folder + "/../model").eval()
        options = dict(max_new_tokens={NEW}, do_sample=False, eos_token_id=None)
        ones = torch.ones_like(ids[1:])
        plain = model.generate(ids[1:], attention_mask=ones, **options)
        model = PeftModel.from_pretrained(model, folder).eval()
        with torch.no_grad():
            logits = model(input_ids=ids[1:], attention_mask=ones).logits
        generated = model.generate(input_ids=ids[1:], attention_mask=ones, **options)
        torch.save((logits, generated, plain), result)
        """,
    )
    torch.testing.assert_close(found[0], logits[1], rtol=1e-3, atol=2e-3)
    dropped = (peft.__version__, version("transformers")) == ("0.21.2", "5.24.0")
    if dropped:
        assert generated.tolist() == plain.tolist()
    else:
        assert generated[0].tolist() in (greedy[1], plain[0].tolist())


@pytest.mark.skipif(not HAS_SINKS, reason="GraniteSWAForCausalLM came with transformers 5.15")
def test_sinks(tmp_path: Path) -> None:
    """As a stock class with eager attention: logits, padding, generation."""
    model = models.planted("llama")
    torch.manual_seed(1)
    plain = output_of(model, models.tokens(2, 9, delimiter_at=None))
    bs.patch_model(model, "attention_bias", kind="sink_logit", std=2.0)
    bs.export(model, tmp_path / "out", format="sinks")
    ids, mask = text()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    greedy = model.generate(ids, attention_mask=mask, **options)
    assert (output_of(model, models.tokens(2, 9, delimiter_at=None)) - plain).abs().max() > 0.05
    found, generated = in_another_process(
        tmp_path / "out",
        f"""
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        assert type(model).__name__ == "GraniteSWAForCausalLM"
        assert set(model.config.layer_types) == {{"full_attention"}}
        assert model.config.sliding_window == model.config.max_position_embeddings
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, position_ids=positions).logits
        options = dict(max_new_tokens={NEW}, do_sample=False, eos_token_id=None)
        torch.save((logits, model.generate(ids, attention_mask=mask, **options)), result)
        """,
    )
    real = mask.bool()
    torch.testing.assert_close(found[real], logits[real], rtol=1e-3, atol=1e-3)
    assert generated[:, LENGTH:].tolist() == greedy[:, LENGTH:].tolist()


@pytest.mark.skipif(not HAS_SINKS, reason="GraniteSWAForCausalLM came with transformers 5.15")
@pytest.mark.parametrize("mode", ["transplant", "kv"])
def test_sinks_of_keys_and_values_say_what_is_lost(mode: str, tmp_path: Path) -> None:
    model = models.planted("llama")
    batches = [models.tokens(3, 12, seed=seed)[:, 1:] for seed in (1, 2)]
    if mode == "transplant":
        key_values = bs.calibrate_key_values(model, models.tokens(4, 12))
        bs.patch_model(model, mode, key_values=key_values)
    else:
        torch.manual_seed(2)
        options = {"kind": "kv", "init": "normal", "std": 1.0, "trainable": "bias"}
        bs.patch_model(model, "attention_bias", **options)
    before = bs.perplexity(model, batches)
    with untouched(model, batches[0]):
        with pytest.raises(BadOption, match="batches"):
            bs.export(model, tmp_path / "out", format="sinks")
        with pytest.warns(UserWarning, match="is lost") as said:
            bs.export(model, tmp_path / "out", format="sinks", batches=batches)
    stock = GraniteSWAForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(stock(ids).logits[:, :-1].mT, ids[:, 1:])
            for ids in batches
        ]
    after = torch.stack(losses).mean().exp().item()
    text = str(said[0].message)
    assert f"{before:.4g} with them and {after:.4g}" in text
    assert abs(after / before - 1) > 1e-3
    assert len(bs.patches(model)) == 1


def test_checkpoint(tmp_path: Path) -> None:
    """A rescaled model in float16, whose values were beyond it."""
    model = models.planted("llama")
    model.model.layers[1].mlp.down_proj.weight.data[models.CHANNEL] *= 40
    ids, mask = text()
    ids[:, -2] = models.DELIMITER_ID
    with torch.no_grad():
        logits = model(ids[1:]).logits
    assert not output_of(models.planted("llama").half(), ids[1:]).isnan().any()
    bs.patch_model(model, "rescale", factor=2.0**-6)
    bs.export(model, tmp_path / "out", format="checkpoint")
    found = in_another_process(
        tmp_path / "out",
        f"""
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()
        ids[:, -2] = {models.DELIMITER_ID}
        with torch.no_grad():
            torch.save(model(ids[1:]).logits.float(), result)
        """,
    )
    assert found.isfinite().all()
    assert (found - logits).abs().max() < 0.02 * logits.abs().max()
    del mask


def test_what_a_format_does_not_hold_is_refused(tmp_path: Path) -> None:
    model = models.planted("llama")
    ids = models.tokens(2, 9, delimiter_at=None)
    with untouched(model, ids):
        for format, match in (
            ("onnx", "format"),
            ("prefix", "transplant"),
            ("cartridge", "transplant"),
            ("sinks", "sink_logit"),
            ("checkpoint", "rescale"),
        ):
            with pytest.raises(BadOption, match=match):
                bs.export(model, tmp_path / "out", format=format)
        key_values = bs.calibrate_key_values(models.planted("gpt2"), ids)
        with pytest.raises(bs.errors.Incompatible):
            bs.export(model, tmp_path / "out", format="prefix", key_values=key_values)
        with pytest.raises(BadOption, match="v' does"):
            bs.export(model, tmp_path / "out", format="sinks", key_values=key_values)
        with pytest.raises(BadOption, match="batches"):
            bs.export(model, tmp_path / "out", format="checkpoint", batches=ids)
    bs.patch_model(model, "instrument")
    with pytest.raises(BadOption, match="instrument"):
        bs.export(model, tmp_path / "out", format="checkpoint")
    other = models.planted("gpt2")
    bs.patch_model(other, "attention_bias", kind="sink_logit")
    error = UnsupportedModel if HAS_SINKS else MissingPackage
    with pytest.raises(error):
        bs.export(other, tmp_path / "out", format="sinks")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_refused(tmp_path: Path) -> None:
    """That a rescaled model was loaded from, above all."""
    model = models.planted("llama")
    model.save_pretrained(tmp_path / "model")
    before = {file: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    bs.patch_model(model, "rescale", factor=0.25)
    with pytest.raises(FileError, match="there already"):
        bs.export(model, tmp_path / "model", format="checkpoint")
    assert {file: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
