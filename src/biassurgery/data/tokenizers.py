"""The tokenizer of a checkpoint, in whichever version of transformers it was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from biassurgery.data.gguf import gguf_file, read_gguf_tokenizer
from biassurgery.data.packaged import local_folder


def read_tokenizer(name: str | Path, *, local_files_only: bool = False) -> Any | None:
    """The checkpoint's own tokenizer, or None if it has none that can be read.

    Args:
        name: a folder, a GGUF file, or a hub name.
        local_files_only: never ask the hub.

    Raises:
        FileError, MissingPackage: a GGUF file that cannot be read here.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = gguf_file(name)
    if file is not None:
        return read_gguf_tokenizer(file)
    # The second reads, in transformers 4, what transformers 5 saved.
    kinds: tuple[Any, ...] = (AutoTokenizer, PreTrainedTokenizerFast)
    for kind in kinds:
        try:
            tokenizer = kind.from_pretrained(
                name, local_files_only=local_files_only, trust_remote_code=False
            )
        except (OSError, ValueError, TypeError, ImportError):
            continue
        # transformers 5 makes an empty tokenizer where there are no files.
        words = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("one", "two")]
        if words[0] and words[0] != words[1]:
            return tokenizer
    return None


def local_tokenizer(name: str) -> Any | None:
    """The checkpoint's own tokenizer; None if it is in no local folder and not in the cache."""
    folder = local_folder(name)
    return None if folder is None else read_tokenizer(folder, local_files_only=True)
