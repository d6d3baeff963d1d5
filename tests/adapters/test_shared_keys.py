"""Models some of whose layers have no keys of their own: measured as they run for their users."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import biassurgery as bs
from tests.census.tiny import LAYERS, VOCAB, tiny_model


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma3n"])
def test_layers_that_share_keys_share_them_while_they_are_measured(model_type):
    """Gemma 3n of transformers 4 makes other keys without a cache than with one."""
    model = tiny_model(model_type)
    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    name = next(n for n, _ in model.named_modules() if n.endswith(f"{LAYERS - 1}.self_attn.o_proj"))
    read = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, args, __: read.append(args[0]))
    with torch.no_grad():
        model(ids)
        hook.remove()
        cache = None
        steps = []
        for token in ids.split(1, 1):  # as it generates
            output = model(token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    logits = torch.cat(steps, 1)[:, :-1].double()
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert bs.perplexity(model, ids) == pytest.approx(loss.exp().item(), rel=1e-5)
    found = {row.name: row for row in bs.diagnose(model, ids).linears}
    assert found[name].largest == pytest.approx(read[0].abs().max().item(), rel=1e-5)
    assert name.replace("o_proj", "k_proj") not in found  # it has not run
