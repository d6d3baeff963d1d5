"""From a name or folder to a model: one of transformers with its tokenizer, or one of timm."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from biassurgery.data.gguf import (
    SUFFIX,
    Source,
    check_readable,
    gguf_file,
    source_of,
    without_traces,
)
from biassurgery.data.onload import device_map_of, offload_folder, removed_with
from biassurgery.data.tokenizers import read_tokenizer
from biassurgery.data.versions import check_read
from biassurgery.errors import BadOption, FileError, first_line
from biassurgery.findings.files import as_path, read_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, the name it was asked for by, and its tokenizer if it has one."""

    model: nn.Module
    name: str
    tokenizer: Any = None


def load_model(
    name: str,
    *,
    weights: Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    onload: str | None = None,
    spill: Path | None = None,
) -> Loaded:
    """Load a model by name.

    Args:
        name: a folder or hub name of a causal language model or an image model of transformers, a
            GGUF file of a language model or a folder with one, or the name of a timm model.
        weights: safetensors file of a timm model's parameters; None: timm's pretrained ones, from
            its cache or the hub.
        dtype: `float32`, `bfloat16` or `float16`; None: the checkpoint's own, float32 for timm and
            for GGUF, whose quantised weights become floating-point numbers.
        device: a torch device; None: the first GPU if there is one, else the CPU.
        onload: `"blocks"` leaves the blocks on disk until they are run, for models larger than
            memory; None: all is loaded.
        spill: with it, a folder for weights that are on disk in another form than the model has
            them; None: where temporary files are.

    Raises:
        FileError: it cannot be loaded, or the file does not hold this model.
        BadOption: an unknown dtype or device, `weights` with a transformers model, or `onload` with
            another.
        MissingPackage: a GGUF file, and gguf is not installed; or accelerate, for `onload`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise BadOption(f"dtype: {dtype!r}; use one of {', '.join(DTYPES)}.")
    folder = as_path("model", name)
    torch_dtype = DTYPES[dtype] if dtype else None
    torch_device = _device(device)
    short = name.removeprefix("timm/")
    file = gguf_file(folder)
    if file is None:
        _check_folder(name, folder)
    timm = file is None and not folder.is_dir() and _is_timm(short)
    if onload is not None:
        _check_on_disk(name, file, timm)
    if timm:
        return Loaded(_timm_model(short, weights).to(torch_device, torch_dtype).eval(), name)
    if weights is not None:
        raise BadOption(
            f"weights: {weights} is for a timm model, and {name!r} is none that timm knows; leave"
            " it out, or check the name."
        )
    if onload is not None:
        model = _on_disk(name, torch_dtype, torch_device, spill)
    elif file is not None:
        model = _of_gguf(file, torch_dtype).to(torch_device)
    else:
        model = _transformers_model(name, torch_dtype).to(torch_device)
    if file is None:
        check_read(model, name)
    model.eval()
    reads_text = model.main_input_name == "input_ids"
    return Loaded(model, name, read_tokenizer(name) if reads_text else None)


def _check_folder(name: str, folder: Path) -> None:
    """Refuse a name that can only be of a folder or file, and is of nothing that holds a model."""
    if folder.is_dir() and not any(folder.iterdir()):
        raise FileError(
            f"model: {name} is an empty folder, with neither config.json and weights nor a GGUF"
            " file in it; give another."
        )
    looks_local = name.startswith((".", "/", "~")) or name.lower().endswith(SUFFIX)
    if looks_local and not folder.is_dir():
        raise FileError(
            f"model: {name} is not a folder; give one with config.json and weights, a GGUF file, or"
            " a name."
        )


def _check_on_disk(name: str, file: Path | None, timm: bool) -> None:
    """Refuse what cannot be left on disk."""
    if file is not None or timm:
        raise BadOption(
            f"onload: {name} is a {'model of timm' if timm else 'GGUF file'}, which is read as a"
            " whole; give a safetensors checkpoint of transformers, or leave onload out."
        )


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadOption(
            f"device: {name!r} cannot be used ({first_line(error)}); try cpu."
        ) from error
    return device


def _is_timm(name: str) -> bool:
    if "/" in name or "\\" in name:
        return False
    import timm

    return timm.is_model(name)


def _timm_model(name: str, weights: Path | None) -> nn.Module:
    import timm

    if weights is None:
        try:
            return timm.create_model(name, pretrained=True)
        except (OSError, RuntimeError) as error:
            raise FileError(
                f"model: timm has no pretrained weights of {name!r} at hand ({first_line(error)});"
                " give a safetensors file as weights, or connect to the hub."
            ) from error
    tensors, _ = read_tensors(weights, "weights")
    try:
        model = timm.create_model(name, pretrained=False)
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise FileError(
            f"weights: {weights} does not hold the parameters of {name!r} ({_shortened(error)});"
            " check both."
        ) from error
    return model


def _of_gguf(file: Path, dtype: torch.dtype | None) -> Any:
    check_readable(file)
    model = _transformers_model(str(file), dtype or torch.float32)
    without_traces(model).config.name_or_path = str(file)
    return model


def _on_disk(name: str, dtype: torch.dtype | None, device: torch.device, spill: Path | None) -> Any:
    """A model whose blocks stay on disk until they are run."""
    source = source_of(name)
    kind = _auto_class(source)
    with torch.device("meta"):
        empty = kind.from_config(_config(source))
    places = device_map_of(empty, str(device))
    folder = offload_folder(name, spill)
    try:
        model = _transformers_model(name, dtype, device_map=places, offload_folder=str(folder))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    removed_with(model, folder)
    return model


def _transformers_model(name: str, dtype: torch.dtype | None, **options: Any) -> Any:
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    try:
        source = source_of(name)
        model, info = _auto_class(source).from_pretrained(
            source.name,
            dtype=dtype or "auto",
            trust_remote_code=False,
            output_loading_info=True,
            **source.options,
            **options,
        )
    except (
        OSError,
        ValueError,
        ImportError,
        RuntimeError,
        SafetensorError,
        UnpicklingError,
    ) as error:
        raise FileError(
            f"model: {name!r} is neither a timm model nor a language model or image model that"
            f" transformers can load here ({_shortened(error)}); check the name, the folder's files"
            " and the connection."
        ) from error
    absent = sorted({*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])})
    if absent:  # transformers would fill them with random numbers
        raise FileError(
            f"model: the weights of {name!r} lack {len(absent)} parameters, {absent[0]} first; the"
            " checkpoint is incomplete or of another architecture."
        )
    return model


def _auto_class(source: Source) -> Any:
    """With its head what can be evaluated: language models and image classifiers.

    All else without.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
    )

    config = _config(source)
    if any(saved.endswith("ForImageClassification") for saved in config.architectures or ()):
        return AutoModelForImageClassification
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel


def _config(source: Source) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source.name, trust_remote_code=False, **source.options)


def _shortened(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
