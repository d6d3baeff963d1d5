"""Published sites: every run loads, values are the source's, and they patch a model of the true
width.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import biassurgery as bs
from biassurgery.edits.massive import WriteEdit
from biassurgery.errors import BadOption, CalibrationRequired, Incompatible
from biassurgery.findings.published import published_names, published_runs, sun_2024

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / ".." / "shared" / "data" / "published" / "massive_activation_sites.json"


def values(sites: bs.Sites) -> dict[tuple[int, int, str], float]:
    return {(site.layer, site.channel, site.role): site.mean for site in sites}


def test_every_run_loads_and_is_massive() -> None:
    assert len(published_runs()) == 36
    assert len(published_names()) == 18
    for run in published_runs():
        sites = bs.Sites.published(run.checkpoint, bos=run.bos)
        assert len(sites) == len(run.sites)
        assert run.checkpoint in sites.origin.source
        assert ("with BOS" if run.bos else "without BOS") in sites.origin.source
        assert len(sites.layers()) <= 1
        for site in sites:
            assert abs(site.mean) > 100
            assert math.isfinite(site.std)
            assert site.count > 0
        assert set(run.perplexity) >= {"original", "set_to_zero"}
        assert run.context_length in (1024, 2048, 4096)


def test_llama_2_values() -> None:
    without = bs.Sites.published("meta-llama/Llama-2-7b-hf", bos=False)
    assert values(without) == {
        (1, 2533, "start"): 769.32,
        (1, 1415, "start"): -459.34,
        (1, 2533, "elsewhere"): 2405.3846,
        (1, 1415, "elsewhere"): -1418.7692,
        (1, 1512, "elsewhere"): -151.8125,
    }
    start = next(site for site in without if (site.channel, site.role) == (2533, "start"))
    assert (start.std, start.count) == (31.027, 283)
    assert (
        values(bs.Sites.published("meta-llama/Llama-2-7b-hf", bos=True))[1, 2533, "start"] == 872.0
    )


@pytest.mark.parametrize(
    ("name", "bos", "expected"),
    [
        (
            "microsoft/phi-2",
            False,
            {
                (1, 293, "elsewhere"): -287.5,
                (1, 743, "elsewhere"): -265.2558,  # 743: not the -620.7 of layer 2
                (1, 293, "start"): -243.0,
                (1, 743, "start"): -248.6154,
            },
        ),
        ("google/gemma-2-2b", True, {(3, 535, "start"): 624.0}),
        ("google/gemma-2-9b", True, {(0, 504, "start"): -532.0}),
        (
            "allenai/OLMo-7B-0724-hf",
            False,
            {(1, 269, "elsewhere"): 211.0, (1, 269, "start"): 372.8081},
        ),
        ("google/gemma-3-12b-pt", True, {(0, 2339, "start"): 11005.0098}),
    ],
)
def test_the_value_nearest_to_what_was_found(
    name: str, bos: bool, expected: dict[tuple[int, int, str], float]
) -> None:
    assert values(bs.Sites.published(name, bos)) == expected


def test_what_is_left_out_and_why() -> None:
    left_out = {
        (run.checkpoint.split("/")[1], run.bos): {
            (s.channel, s.role): (s.value, s.observed_mean) for s in run.left_out
        }
        for run in published_runs()
        if run.left_out
    }
    assert left_out["falcon-11B", True] == {  # written at layer 3, found at layer 2
        (1926, "elsewhere"): (109.0521, 25.476),
        (1926, "start"): (184.0, -3.5),
        (3621, "start"): (3776.0, 121.5),
        (3830, "start"): (-324.0, -37.0),
    }
    assert left_out["Llama-2-7b-hf", False] == {
        (1512, "start"): (-38.3525, -38.413)
    }  # never massive there
    assert left_out["phi-4", True][3693, "start"] == (-8.5625, -8.562)
    for sites in left_out.values():
        for value, observed in sites.values():
            assert abs(value) <= 100 or observed / value < 0.5
    assert sum(map(len, left_out.values())) == 19


@pytest.mark.parametrize(
    ("name", "bos"),
    [
        ("meta-llama/Llama-2-7b-hf", True),
        ("meta-llama/Llama-3.2-1B", True),
        ("mistralai/Mistral-7B-v0.3", True),
        ("google/gemma-7b", True),
        ("facebook/opt-6.7b", True),
        ("openai-community/gpt2", False),
        ("tiiuae/falcon-7b", False),
        ("allenai/OLMo-7B-0724-hf", False),
        ("microsoft/phi-2", False),
        ("microsoft/phi-4", False),
    ],
)
def test_the_default_is_what_the_tokenizer_does(name: str, bos: bool) -> None:
    assert bs.Sites.published(name) == bs.Sites.published(name, bos)
    assert bs.Sites.published(name) != bs.Sites.published(name, not bos)


def test_names() -> None:
    assert (
        bs.Sites.published("gpt2")
        == bs.Sites.published("OpenAI-Community/GPT2")
        == bs.Sites.published("openai-community/gpt2")
    )
    assert "openai-community/gpt2" in published_names()
    with pytest.raises(
        CalibrationRequired,
        match=r"'nobody/nothing'.*calibrate\(model.*mistralai/Mistral-7B-v0\.3",
    ):
        bs.Sites.published("nobody/nothing")


def test_architectures() -> None:
    kinds = {
        run.checkpoint: bs.Sites.published(run.checkpoint, run.bos).origin.architecture
        for run in published_runs()
    }
    assert kinds["allenai/OLMo-2-1124-7B"] == "olmo2"
    assert kinds["microsoft/phi-4"] == "phi3"
    assert kinds["google/gemma-3-1b-pt"] == "gemma3_text"
    assert {name for name, kind in kinds.items() if kind is None} == {
        "google/gemma-3-4b-pt",
        "google/gemma-3-12b-pt",
    }


def test_a_run_without_massive_activations_is_empty_and_says_so() -> None:
    sites = bs.Sites.published("allenai/OLMo-2-1124-7B")
    assert len(sites) == 0
    assert "no massive activations found" in sites.origin.source


@pytest.mark.skipif(
    not SOURCE.is_file(),
    reason="the folder `shared` beside the repository, with the published source, is absent",
)
def test_the_asset_is_what_the_script_makes_of_the_source(tmp_path: Path) -> None:
    script = REPOSITORY / "training" / "distil_published_sites.py"
    subprocess.run([sys.executable, script, SOURCE, tmp_path / "made.json"], check=True)
    asset = REPOSITORY / "src" / "biassurgery" / "assets" / "published_sites.json"
    assert (tmp_path / "made.json").read_text() == asset.read_text()


def test_sun_2024() -> None:
    table = sun_2024()
    assert table["perplexity"]["meta-llama/Llama-2-7b-hf"]["original"] == [5.47, 7.85, 8.57]
    assert {"channel": 2533, "role": "start", "mean": 767.6} in table["meta-llama/Llama-2-7b-hf"]


def gpt2() -> GPT2LMHeadModel:
    """GPT-2 of the true width and too few layers, whose block 2 writes 2000 to channel 447 of every
    token.
    """
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=768,
        n_layer=4,
        n_head=12,
        vocab_size=100,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.h[2].mlp.c_proj.bias[447] = 2000.0
    return model


def block_output(model: GPT2LMHeadModel, ids: torch.Tensor, layer: int) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    block = model.transformer.h[layer]
    hook = block.register_forward_hook(
        lambda _, __, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    with torch.no_grad():
        model(ids)
    hook.remove()
    return seen[0]


def test_they_patch_a_model_of_the_true_width() -> None:
    model = gpt2()
    ids = torch.arange(12).reshape(2, 6)
    before = block_output(model, ids, 2)
    assert (before[..., 447] - 2000).abs().max() < 10
    with bs.patched(model, "set_mean", sites=bs.Sites.published("gpt2")):
        after = block_output(model, ids, 2)
    expected = before.clone()
    expected[..., 447] = 2479.2
    assert torch.equal(after, expected)
    assert torch.equal(block_output(model, ids, 2), before)


def test_they_are_refused_by_another_architecture_and_by_a_model_too_narrow() -> None:
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=20,
    )
    llama = LlamaForCausalLM(config)
    with pytest.raises(Incompatible, match="gpt2"):
        bs.patch_model(llama, "set_mean", sites=bs.Sites.published("gpt2"))
    with pytest.raises(BadOption, match="2533"):
        bs.patch_model(
            llama, "set_mean", sites=bs.Sites.published("meta-llama/Llama-2-7b-hf").at(1)[4:]
        )
    assert bs.patches(llama) == ()


def test_what_is_filtered_out_of_published_sites_stays():
    """LLaMA-2-7B's channel 2533 has a level at the start token and one elsewhere."""
    published = bs.Sites.published("meta-llama/Llama-2-7b-hf")
    channel = 2533
    (start,) = [s for s in published if s.channel == channel and s.role == "start"]
    (other,) = [s for s in published if s.channel == channel and s.role == "elsewhere"]
    edit = WriteEdit(bs.Sites([start], origin=published.origin), {start: 1.0})
    hidden = torch.zeros(1, 3, 4096)
    hidden[0, :, channel] = torch.tensor([start.mean * 1.05, other.mean * 0.95, 2.0])
    found = edit(hidden)[0, :, channel]
    assert found.tolist() == [1.0, hidden[0, 1, channel].item(), 2.0]
