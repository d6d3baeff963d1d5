"""The arguments and options that commands share, and how a command takes them all at once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer


class Bos(str, Enum):
    """Whether a BOS token goes in front of every window; `auto`: as the tokenizer does."""

    auto = "auto"
    yes = "yes"
    no = "no"


class Split(str, Enum):
    """Which windows or images to take."""

    all = "all"
    even = "even"
    odd = "odd"


class Dtype(str, Enum):
    """What the model computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help=(
            "A folder or hub name of a causal language model or vision transformer "
            "of transformers, a GGUF file, or the name of a model of timm."
        ),
    ),
]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        "--text", metavar="FILE", help="UTF-8 text; may be repeated. Default: a packaged text."
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help=(
            "Images, with labels.csv (file, class_index) or one sub-folder a class "
            "where labels are needed. Default: packaged photographs."
        ),
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Parameters of a timm model (safetensors). Default: timm's own."
    ),
]
Length = Annotated[
    int | None,
    typer.Option(
        min=2, help="Tokens a window, BOS included. Default: the model's context, at most 2048."
    ),
]
BosOption = Annotated[
    Bos,
    typer.Option(
        "--bos",
        help="A BOS token in front of every window; auto: as the checkpoint's tokenizer does.",
    ),
]
StartOption = Annotated[
    str | None,
    typer.Option(
        "--start",
        metavar="TOKEN",
        help=(
            "A constant token in front of every window, such as '<|im_start|>', or its id; the "
            "same tokens are scored with and without it. For tokenizers that add no BOS."
        ),
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Windows or images a forward.")]
Limit = Annotated[
    int | None,
    typer.Option(
        "--max-windows", "--max-images", min=1, help="Take this many at most, after --split."
    ),
]
SplitOption = Annotated[
    Split,
    typer.Option(
        "--split", help="Every other window or image, from the first (even) or the second (odd) on."
    ),
]
MinMagnitude = Annotated[
    float, typer.Option(min=0, help="A massive activation has a larger magnitude than this, and")
]
MinRatio = Annotated[
    float,
    typer.Option(min=0, help="than this many times the median of its sequence's hidden state."),
]
SitesToUse = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help=(
            "From calibrate. Default: published sites of the checkpoint, "
            "else a calibration on packaged data."
        ),
    ),
]
KeyValuesToUse = Annotated[
    Path | None,
    typer.Option(
        "--key-values",
        metavar="FILE",
        help="From calibrate, for transplant and attention_bias. Default: measured.",
    ),
]
MeansToUse = Annotated[
    Path | None,
    typer.Option(
        "--means",
        metavar="FILE",
        help="Register means, for fix_registers; also the paper's .pt. Default: measured.",
    ),
]
NeuronsToUse = Annotated[
    Path | None,
    typer.Option(
        "--neurons",
        metavar="FILE",
        help="Register neurons, for test_time_registers. Default: measured.",
    ),
]
SitesToSave = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Where to save the sites (safetensors).")
]
KeyValuesToSave = Annotated[
    Path | None,
    typer.Option(
        "--key-values",
        metavar="FILE",
        help="Measure the start token's keys and values as well, and save them there.",
    ),
]
MeansToSave = Annotated[
    Path | None,
    typer.Option(
        "--means", metavar="FILE", help="Measure the register means as well, and save them there."
    ),
]
Prompt = Annotated[
    str | None, typer.Option("--prompt", metavar="TEXT", help="What the model reads.")
]
PatchFolder = Annotated[
    Path | None,
    typer.Option("--patch", metavar="FOLDER", help="A patch that `biassurgery patch` wrote."),
]
Modes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODE",
        help=(
            "May be repeated; with options as in set_value:value=5 or fix_registers:fill=zero. "
            "Default: set_zero, set_mean, and for numbers zero_random."
        ),
    ),
]
LayersOption = Annotated[
    str,
    typer.Option(
        help=(
            "first (where massive values are born and grow; all of attentions and registers), all, "
            "or indices such as 2,5."
        )
    ),
]
DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", help="Default: the checkpoint's own.")
]
Device = Annotated[
    str | None, typer.Option(help="Such as cpu or cuda:1. Default: the first GPU, else the CPU.")
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help=(
            "Keep what is counted there; the same command goes on from it after an interruption. "
            "It stays at the end. eval: one file a mode, FILE.original and so on."
        ),
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON document and nothing else; infinities become null."
    ),
]


@dataclass(frozen=True)
class Request:
    """What the user asked for: which model, and what it is to read."""

    model: ModelName
    text: Texts = None
    images: Images = None
    weights: Weights = None
    length: Length = None
    bos: BosOption = Bos.auto
    start: StartOption = None
    batch_size: BatchSize = 8
    limit: Limit = None
    split: SplitOption = Split.all
    dtype: DtypeOption = None
    device: Device = None


@dataclass(frozen=True)
class Given:
    """The files of findings that a patch is made from."""

    sites: SitesToUse = None
    key_values: KeyValuesToUse = None
    means: MeansToUse = None
    neurons: NeuronsToUse = None


def with_request(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose `Request` and `Given` are options of their own, one a field.

    typer reads options off the signature: `(request, json)` becomes `(model, text, ..., json)`.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    groups: dict[str, Any] = {
        one.name: one.annotation for one in own if is_dataclass(one.annotation)
    }
    options = [
        option
        for one in own
        for option in (_options_of(groups[one.name]) if one.name in groups else [_keyword(one)])
    ]

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        values = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **given)

    with_options.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    with_options.__annotations__ = {option.name: option.annotation for option in options}
    return with_options


def _options_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


def _keyword(option: inspect.Parameter) -> inspect.Parameter:
    return option.replace(kind=inspect.Parameter.KEYWORD_ONLY)
