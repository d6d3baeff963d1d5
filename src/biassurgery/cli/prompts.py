"""A prompt as token ids."""

from __future__ import annotations

from torch import Tensor

from biassurgery.cli.inputs import Inputs
from biassurgery.errors import BadOption


def prompt_ids(inputs: Inputs, prompt: str) -> Tensor:
    """(1, T) int64 token ids behind the start token that windows have.

    Raises:
        BadOption: the model reads images, or there is no token.
    """
    import torch

    from biassurgery.data.windows import tokenize

    if not inputs.reads_text:
        raise BadOption(f"prompt: {inputs.model['name']} reads images; leave --prompt out.")
    ids = torch.cat([torch.tensor(inputs.front).long(), tokenize(inputs.tokenizer, prompt)])
    if not len(ids):
        raise BadOption(f"prompt: {prompt!r} holds no tokens; give a text.")
    return ids[None]
