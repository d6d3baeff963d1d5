"""What the structural fallback must do with one causal-LM type, checked on a tiny random model
against plain tensor arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import biassurgery as bs
from biassurgery.adapters.registry import Host, Tower, find_host
from biassurgery.errors import UnsupportedModel
from biassurgery.measure.observe import observed
from tests.census.tiny import needs_cache, tiny_model
from tests.state import untouched

ROWS = 2
LENGTH = 8
KINDS = ("kv", "sink_logit", "off_by_one", "gate")  # of explicit biases


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
    """Build a tiny model of the type and check all that `Examination` does; a refusal of the
    library is a verdict, a wrong number an error.

    Raises:
        AssertionError: the library served the model, but wrongly.
    """
    try:
        model = tiny_model(model_type)
        batch = batch_of(model_type)
        own = forward(
            model, batch, output_hidden_states=True
        ).hidden_states  # transformers leaves hooks of its own behind
    except Exception as error:  # noqa: BLE001 whatever transformers raises
        return Verdict(False, f"{type(error).__name__}: {' '.join(str(error).split())}")
    try:
        host = find_host(model)
    except UnsupportedModel as refusal:
        return Verdict(True, str(refusal).split("\n")[0])

    def output() -> Tensor:
        return forward(model, batch).logits

    with untouched(model):
        Examination(host, batch, own, output).run()
        refused = attention(model, output)
    return Verdict(True, attention=refused)


def attention(
    model: nn.Module,
    output: Callable[[], Tensor],
    kinds: Sequence[str] = KINDS,
    tower: Tower | None = None,
) -> str | None:
    """Instrumented attention and biases without effect are the identity, other biases are not; or
    why the library refuses.
    """
    plain = output()
    patched = partial(bs.patched, model, tower=tower)
    try:
        for kind in kinds:
            initial = {} if kind == "off_by_one" else {"init": "normal", "std": 3.0}
            with patched("attention_bias", kind=kind, **initial):
                assert not torch.equal(output(), plain), kind
        for kind in (None, *kinds):
            if kind == "off_by_one":
                continue
            with (
                patched("attention_bias", kind=kind, init="zero_effect")
                if kind
                else patched("instrument")
            ):
                torch.testing.assert_close(output(), plain, rtol=1e-4, atol=1e-4)
    except bs.SurgeryError as refusal:
        return str(refusal).split("\n")[0]
    assert torch.equal(output(), plain)
    return None


def batch_of(model_type: str) -> dict[str, Any]:
    """Token ids (ROWS, LENGTH), all different, and what else a type needs for all of its layers to
    run.
    """
    ids = 5 + torch.randperm(ROWS * LENGTH, generator=torch.Generator().manual_seed(3)).view(
        ROWS, LENGTH
    )
    batch: dict[str, Any] = {"input_ids": ids}
    if model_type == "mllama":  # its cross-attention layers run only if there is an image
        batch["cross_attention_states"] = torch.randn(
            ROWS, 6, 32, generator=torch.Generator().manual_seed(4)
        )
    return batch


def forward(model: nn.Module, batch: dict[str, Any], **options: Any) -> Any:
    """What the model returns, always with the same random numbers, without a cache where it has
    one.
    """
    torch.manual_seed(0)
    cache = {} if needs_cache(model) else {"use_cache": False}
    with torch.no_grad():
        return model(**batch, **cache, **options)


class Examination:
    """Identity, `set_mean`, `set_zero` and restoring, on one model.

    Args:
        host: the model.
        batch: what `output` runs it on.
        own: what the model itself says its hidden states are.
        output: runs it.
    """

    def __init__(
        self, host: Host, batch: Any, own: Sequence[Tensor], output: Callable[[], Tensor]
    ) -> None:
        self.host = host
        self.model = host.root
        self.batch = batch
        self.own = own
        self.forward = output
        self.plain = self.forward()
        self.hidden = self.outputs()

    def run(self) -> None:
        self.identity()
        self.calibration()
        peaks = [peak(layer, hidden, self.host.roles) for layer, hidden in enumerate(self.hidden)]
        with self.patch("set_mean", peaks):
            self.same(self.forward())
        for site in peaks:
            self.writes(
                "set_mean",
                bs.Site(site.layer, site.channel, site.role, mean=2 * site.mean, gate=site.gate),
                2 * site.mean,
            )
            self.writes("set_zero", site, 0.0)
        assert torch.equal(self.forward(), self.plain)

    def same(self, output: Tensor) -> None:
        """Blocks that returned the same numbers lead to the same output."""
        assert torch.equal(output, self.plain)

    @contextmanager
    def patch(self, mode: str, sites: list[bs.Site]) -> Iterator[None]:
        tower = self.host.tower
        with bs.patched(self.model, mode, sites=bs.Sites(sites), layers="all", tower=tower):
            yield

    def outputs(self) -> list[Tensor]:
        """The output of every block (ROWS, LENGTH, width), by the library's own observers, which
        must not change the result.
        """
        seen: dict[int, list[Tensor]] = {}
        with observed(
            self.host, lambda layer, hidden: seen.setdefault(layer, []).append(hidden.clone())
        ):
            self.logits = self.forward()
        assert sorted(seen) == list(range(len(self.host.blocks)))
        assert all(len(times) == 1 for times in seen.values())
        return [seen[layer][0] for layer in sorted(seen)]

    def identity(self) -> None:
        """Observing changes no bit, and what is observed is what the model itself calls the hidden
        states after each layer.
        """
        assert torch.equal(self.logits, self.plain)
        assert len(self.own) == len(self.hidden) + 1  # theirs begin with the embeddings
        for hidden in self.hidden:
            assert hidden.shape == (ROWS, LENGTH, self.host.width)
        for hidden in self.hidden[:-1]:  # the last one of theirs is behind the final norm
            assert any(
                torch.equal(reading, hidden) for state in self.own for reading in readings(state)
            )

    def calibration(self) -> None:
        """A threshold just below the largest magnitude of all finds that value, and measuring
        leaves the model as it was.
        """
        magnitude = torch.stack(self.hidden).abs()
        largest = magnitude.amax()
        sites = bs.calibrate(
            self.model,
            self.batch,
            min_magnitude=0.999 * largest.item(),
            min_ratio=0,
            tower=self.host.tower,
            progress=False,
        )
        expected = {
            (layer, channel)
            for layer, _, _, channel in (magnitude > 0.999 * largest).nonzero().tolist()
        }
        assert {(site.layer, site.channel) for site in sites} == expected
        assert torch.equal(self.forward(), self.plain)

    def writes(self, mode: str, site: bs.Site, value: float) -> None:
        """The value stands where the peak was, every other number of that block's output is as
        before, and the logits change.
        """
        expected = self.hidden[site.layer].clone()
        column = expected[..., site.channel]
        gate = site.gate
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
    """A hidden state that a model reports, as (ROWS, LENGTH, width), from every layout that there
    is.
    """
    if state.dim() == 3:
        return [state, state.transpose(0, 1)]
    return [
        torch.cat(list(state.unbind(2)), -1),
        torch.cat(list(state.unbind(0)), -1),
    ]  # streams beside each other, streams first


def peak(layer: int, hidden: Tensor, roles: Sequence[str]) -> bs.Site:
    """The largest value of a block's output as a site, gated half-way to the next smaller one of
    its channel.
    """
    row, token, channel = (
        int(index) for index in torch.unravel_index(hidden.abs().argmax(), hidden.shape)
    )
    magnitude = hidden[..., channel].abs()
    top = magnitude.amax()
    gate = (top + magnitude[magnitude < top].amax()).item() / 2
    return bs.Site(
        layer,
        channel,
        roles[min(token, len(roles) - 1)],
        mean=hidden[row, token, channel].item(),
        gate=gate,
    )
