"""What the structural fallback must do with one causal-LM type, checked on a tiny random model against plain tensor arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.adapters.registry import Host, find_host
from biassurgery.observe import observed
from tests.census.tiny import tiny_model
from tests.state import untouched

ROWS, LENGTH = 2, 8


@dataclass(frozen=True)
class Verdict:
    """What came out for one type; a reason is None if all is well.

    Attributes:
        built: transformers can make a model of the type.
        reason: why it is not served, or not built.
        attention: why modes on its attention are not served.
    """

    built: bool
    reason: str | None = None
    attention: str | None = None


def examine(model_type: str) -> Verdict:
    """Build a tiny model of the type and check all that `Examination` does; a refusal of the library is a verdict, a wrong number an error.

    Raises:
        AssertionError: the library served the model, but wrongly.
    """
    try:
        model, batch = tiny_model(model_type), batch_of(model_type)
        own = forward(model, batch, output_hidden_states=True).hidden_states  # transformers leaves hooks of its own behind
    except Exception as error:  # noqa: BLE001 whatever transformers raises
        return Verdict(False, f"{type(error).__name__}: {' '.join(str(error).split())}")
    try:
        host = find_host(model)
    except bs.UnsupportedModel as refusal:
        return Verdict(True, str(refusal).split("\n")[0])
    with untouched(model):
        Examination(host, batch, own).run()
        refused = attention(model, batch)
    return Verdict(True, attention=refused)


def attention(model: nn.Module, batch: dict[str, Any]) -> str | None:
    """Instrumented attention and biases without effect are the identity, other biases are not; or why the library refuses."""
    plain = forward(model, batch).logits
    biases: list[dict[str, Any]] = [{"kind": kind} for kind in ("kv", "sink_logit", "off_by_one", "gate")]
    try:
        for options in biases:
            initial = {} if options["kind"] == "off_by_one" else {"init": "normal", "std": 3.0}
            with bs.patched(model, "attention_bias", **options, **initial):
                assert not torch.equal(forward(model, batch).logits, plain), options
        for options in ({}, *biases):
            if options.get("kind") == "off_by_one":
                continue
            with bs.patched(model, "attention_bias", **options, init="zero_effect") if options else bs.patched(model, "instrument"):
                torch.testing.assert_close(forward(model, batch).logits, plain, rtol=1e-4, atol=1e-4)
    except bs.SurgeryError as refusal:
        return str(refusal).split("\n")[0]
    assert torch.equal(forward(model, batch).logits, plain)
    return None


def batch_of(model_type: str) -> dict[str, Any]:
    """Token ids (ROWS, LENGTH), all different, and what else a type needs for all of its layers to run."""
    ids = 5 + torch.randperm(ROWS * LENGTH, generator=torch.Generator().manual_seed(3)).view(ROWS, LENGTH)
    batch: dict[str, Any] = {"input_ids": ids}
    if model_type == "mllama":  # its cross-attention layers run only if there is an image
        batch["cross_attention_states"] = torch.randn(ROWS, 6, 32, generator=torch.Generator().manual_seed(4))
    return batch


def forward(model: nn.Module, batch: dict[str, Any], **options: Any) -> Any:
    """What the model returns, always with the same random numbers, without a cache where it has one."""
    torch.manual_seed(0)
    cache = {} if getattr(model.config, "mem_len", None) else {"use_cache": False}
    with torch.no_grad():
        return model(**batch, **cache, **options)


class Examination:
    """Identity, `set_mean`, `set_zero` and restoring, on one model."""

    def __init__(self, host: Host, batch: dict[str, Any], own: tuple[Tensor, ...]) -> None:
        self.host, self.model, self.batch, self.own = host, host.model, batch, own
        self.plain = self.forward()
        self.hidden = self.outputs()

    def run(self) -> None:
        self.identity()
        self.calibration()
        peaks = [peak(layer, hidden) for layer, hidden in enumerate(self.hidden)]
        with self.patch("set_mean", peaks):
            assert torch.equal(self.forward(), self.plain)
        for site in peaks:
            self.writes("set_mean", bs.Site(site.layer, site.channel, site.role, mean=2 * site.mean, gate=site.gate), 2 * site.mean)
            self.writes("set_zero", site, 0.0)
        assert torch.equal(self.forward(), self.plain)

    def forward(self) -> Tensor:
        return forward(self.model, self.batch).logits

    @contextmanager
    def patch(self, mode: str, sites: list[bs.Site]) -> Iterator[None]:
        with bs.patched(self.model, mode, sites=bs.Sites(sites), layers="all"):
            yield

    def outputs(self) -> list[Tensor]:
        """The output of every block (ROWS, LENGTH, width), by the library's own observers, which must not change the result."""
        seen: dict[int, list[Tensor]] = {}
        with observed(self.host, lambda layer, hidden: seen.setdefault(layer, []).append(hidden.clone())):
            self.logits = self.forward()
        assert sorted(seen) == list(range(len(self.host.blocks)))
        assert all(len(times) == 1 for times in seen.values())
        return [seen[layer][0] for layer in sorted(seen)]

    def identity(self) -> None:
        """Observing changes no bit, and what is observed is what the model itself calls the hidden states after each layer."""
        assert torch.equal(self.logits, self.plain)
        assert len(self.own) == len(self.hidden) + 1  # theirs begin with the embeddings
        for hidden in self.hidden:
            assert hidden.shape == (ROWS, LENGTH, self.host.width)
        for hidden in self.hidden[:-1]:  # the last one of theirs is behind the final norm
            assert any(torch.equal(reading, hidden) for state in self.own for reading in readings(state))

    def calibration(self) -> None:
        """A threshold just below the largest magnitude of all finds that value, and measuring leaves the model as it was."""
        magnitude = torch.stack(self.hidden).abs()
        largest = magnitude.amax()
        sites = bs.calibrate(self.model, self.batch, min_magnitude=0.999 * largest.item(), min_ratio=0, progress=False)
        expected = {(layer, channel) for layer, _, _, channel in (magnitude > 0.999 * largest).nonzero().tolist()}
        assert {(site.layer, site.channel) for site in sites} == expected
        assert torch.equal(self.forward(), self.plain)

    def writes(self, mode: str, site: bs.Site, value: float) -> None:
        """The value stands where the peak was, every other number of that block's output is as before, and the logits change."""
        expected = self.hidden[site.layer].clone()
        column, gate = expected[..., site.channel], site.gate
        assert gate is not None
        column[column.abs() > gate] = value
        with self.patch(mode, [site]):
            changed = self.outputs()
        assert torch.equal(changed[site.layer], expected)
        assert not torch.equal(changed[site.layer], self.hidden[site.layer])
        assert all(torch.equal(a, b) for a, b in zip(changed[: site.layer], self.hidden))
        effect = (self.logits - self.plain).abs().amax() / self.plain.std()
        assert effect > 1e-4


def readings(state: Tensor) -> list[Tensor]:
    """A hidden state that a model reports, as (ROWS, LENGTH, width), from every layout that there is."""
    if state.dim() == 3:
        return [state, state.transpose(0, 1)]
    return [torch.cat(list(state.unbind(2)), -1), torch.cat(list(state.unbind(0)), -1)]  # streams beside each other, streams first


def peak(layer: int, hidden: Tensor) -> bs.Site:
    """The largest value of a block's output as a site, gated half-way to the next smaller one of its channel."""
    row, token, channel = (int(index) for index in torch.unravel_index(hidden.abs().argmax(), hidden.shape))
    magnitude = hidden[..., channel].abs()
    top = magnitude.amax()
    gate = (top + magnitude[magnitude < top].amax()).item() / 2
    role = "start" if token == 0 else "elsewhere"
    return bs.Site(layer, channel, role, mean=hidden[row, token, channel].item(), gate=gate)
