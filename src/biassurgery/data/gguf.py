"""GGUF files: which one is meant, and what is in them as an ordinary model and tokenizer.

transformers reads them (`gguf_file=`): it makes floating-point weights of the quantised ones, but
remembers where they are from and then refuses `save_pretrained`. Its tokenizers do not all obey the
file, which says itself whether BOS goes in front and which tokens begin and end a text.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from biassurgery.errors import FileError, MissingPackage
from biassurgery.findings.files import CORRUPT, told

SUFFIX = ".gguf"
_TRACES = ("hf_quantizer", "quantization_method", "is_quantized")  # on a model that was read
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # here, and in the file
# Without token types, which transformers 4 adds otherwise, and decoders do not take.
_INPUTS = ["input_ids", "attention_mask"]


class Source(NamedTuple):
    """What `from_pretrained` is given: a name, and further arguments."""

    name: str
    options: dict[str, str]


def source_of(name: str | Path) -> Source:
    """Where a checkpoint is: a GGUF file, one in a folder without `config.json`, or by name.

    Raises:
        FileError: a folder with several GGUF files.
    """
    file = gguf_file(name)
    if file is None:
        return Source(str(name), {})
    return Source(str(file.parent), {"gguf_file": file.name})


def gguf_file(name: str | Path) -> Path | None:
    """The GGUF file that a name stands for, if it does.

    Raises:
        FileError: a folder with several.
    """
    path = Path(name)
    if os.path.isfile(path):  # False, where Path.is_file() raises: the name may be of any length
        return path if path.suffix.lower() == SUFFIX else None
    if not os.path.isdir(path) or (path / "config.json").exists():
        return None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == SUFFIX)
    if len(files) > 1:
        raise FileError(
            f"model: {path} holds {len(files)} GGUF files, {files[0].name} and"
            f" {files[1].name} among them; give the path of one. One model in several files has to"
            " be joined first (llama.cpp's llama-gguf-split --merge)."
        )
    return files[0] if files else None


def check_readable(file: Path) -> None:
    """Refuse a GGUF file that cannot be read, before transformers tries.

    Raises:
        FileError: no GGUF, truncated, damaged, or of an architecture that transformers cannot read.
        MissingPackage: the package gguf is not installed.
    """
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    architecture = _Header.read(file).architecture
    known = {name.replace("_", "").replace("-", "") for name in GGUF_SUPPORTED_ARCHITECTURES}
    if architecture.replace("_", "").replace("-", "") not in known:
        raise FileError(
            f"model: {file} is a GGUF file of architecture {architecture!r}, which this version of"
            " transformers cannot read; give the original checkpoint instead."
        )


def check_package(what: str) -> None:
    """Raise `MissingPackage` if gguf is not installed; `what` begins the sentence."""
    if find_spec("gguf") is None:
        raise MissingPackage(
            f"model: {what} a GGUF file, and gguf is not installed; pip install"
            " 'biassurgery[gguf]', or gguf itself."
        )


def without_traces(model: Any) -> Any:
    """Make a model that was read from a GGUF file an ordinary one, which can be saved.

    Returns the same object.
    """
    for name in _TRACES:
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    return model


def read_gguf_tokenizer(file: Path) -> Any | None:
    """The tokenizer in a GGUF file, with the special tokens that the file names; None: it has none.

    Raises:
        FileError: it is damaged, or this version of transformers reads it wrongly.
        MissingPackage: the package gguf is not installed.
    """
    from transformers import PreTrainedTokenizerFast

    header = _Header.read(file)
    if "tokenizer.ggml.tokens" not in header.fields:
        return None
    _check_version(file, header)
    try:
        read = PreTrainedTokenizerFast.from_pretrained(str(file.parent), gguf_file=file.name)
    except Exception as error:  # the package tokenizers raises no other
        raise FileError(
            f"model: {file} holds a tokenizer that transformers cannot read ({told(error)}); fetch"
            " the file again, or give the original checkpoint."
        ) from error
    raw = read.backend_tokenizer
    special = {
        f"{name}_token": raw.id_to_token(header.fields[f"tokenizer.ggml.{called}_token_id"])
        for name, called in _SPECIAL.items()
        if f"tokenizer.ggml.{called}_token_id" in header.fields
    }
    if "tokenizer.ggml.add_bos_token" in header.fields:
        raw.post_processor = _template(raw, header, special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        clean_up_tokenization_spaces=False,
        model_input_names=_INPUTS,
        **special,
    )
    tokenizer.chat_template = read.chat_template
    return tokenizer


class _Header(NamedTuple):
    """What a GGUF file says about itself: numbers and texts by name; of lists their length."""

    fields: dict[str, Any]

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture", ""))

    @classmethod
    def read(cls, file: Path) -> _Header:
        check_package(f"{file} is")
        try:
            state = file.stat()
            return cls(_fields_of(file, state.st_mtime_ns, state.st_size))
        except (OSError, *CORRUPT) as error:
            raise FileError(
                f"model: {file} cannot be read as GGUF ({told(error)}); it may be truncated or of"
                " another format: fetch it again."
            ) from error


@lru_cache(maxsize=1)
def _fields_of(file: Path, _modified: int, _size: int) -> dict[str, Any]:
    """The fields of a header; kept, for a large vocabulary takes many seconds."""
    from gguf import GGUFReader

    return {name: _value(field) for name, field in GGUFReader(file).fields.items()}


def _value(field: Any) -> Any:
    from gguf import GGUFValueType

    if field.types and field.types[0] is GGUFValueType.ARRAY:
        return len(field.data)
    return field.contents()


def _check_version(file: Path, header: _Header) -> None:
    """Refuse what transformers 4 gets wrong: it splits Gemma's text by scores that are not there.

    The same text becomes 3,529 tokens instead of 1,905, and a perplexity that means nothing.
    """
    import transformers

    if header.architecture.startswith("gemma") and transformers.__version__.startswith("4."):
        raise FileError(
            f"model: {file} holds Gemma's tokenizer, which transformers {transformers.__version__}"
            " reads wrongly from GGUF; use transformers 5, or a folder that `biassurgery convert`"
            " wrote with it."
        )


def _template(raw: Any, header: _Header, special: dict[str, str]) -> Any:
    """What the file puts around every text."""
    from tokenizers.processors import TemplateProcessing

    before = [special["bos_token"]] if header.fields["tokenizer.ggml.add_bos_token"] else []
    after = [special["eos_token"]] if header.fields.get("tokenizer.ggml.add_eos_token") else []
    return TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=[(token, raw.token_to_id(token)) for token in {*before, *after}],
    )
