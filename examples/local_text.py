"""Local text as training data: .txt files, bytes or tokens, or the token files that nanoGPT's
`prepare.py` writes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from biassurgery.data.packaged import packaged_text

HELD_OUT = 0.01  # share of a text kept for evaluation


class LocalText:
    """Windows at random places of a text.

    Args:
        path: a .txt file, a folder of them, or a folder with `train.bin` and `val.bin` (uint16
            tokens, read as they are needed); None: the packaged public-domain text, of which one
            half is for training and the other held out.
        tokenizer: name or folder of a tokenizer; None: the text's bytes are its tokens.

    Attributes:
        tokens: vocabulary size.
    """

    def __init__(self, path: str | None, tokenizer: str | None) -> None:
        self.tokens, encode = _encoder(tokenizer)
        if path is None:
            self.train, self.held_out = (
                encode(packaged_text(name)) for name in ("calibration", "evaluation")
            )
        elif Path(path, "train.bin").is_file():
            self.train, self.held_out = (
                np.memmap(Path(path, f"{name}.bin"), np.uint16, "r") for name in ("train", "val")
            )
        else:
            files = sorted(Path(path).glob("*.txt")) if Path(path).is_dir() else [Path(path)]
            ids = encode("\n".join(file.read_text(encoding="utf-8") for file in files))
            self.held_out, self.train = np.split(ids, [int(HELD_OUT * len(ids))])

    def sample(
        self, rows: int, length: int, generator: torch.Generator, held_out: bool = False
    ) -> Tensor:
        """(rows, length) int64."""
        ids = self.held_out if held_out else self.train
        starts = torch.randint(len(ids) - length + 1, (rows, 1), generator=generator)
        return torch.from_numpy(ids[(starts + torch.arange(length)).numpy()].astype(np.int64))

    def scores(self, logits: Tensor, ids: Tensor) -> dict[str, float]:
        """Nothing more than the loss: the truth about a text is not known."""
        return {}


def _encoder(tokenizer: str | None):
    if tokenizer is None:
        return 256, lambda text: np.frombuffer(text.encode("utf-8"), np.uint8)
    from transformers import AutoTokenizer

    known = AutoTokenizer.from_pretrained(tokenizer)
    return len(known), lambda text: np.array(
        known(text, add_special_tokens=False, verbose=False)["input_ids"]
    )
