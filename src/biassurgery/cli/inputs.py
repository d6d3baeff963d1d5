"""From the options of a command to a model and its data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from biassurgery.cli.onloading import Onloading
from biassurgery.cli.options import Bos, Request
from biassurgery.errors import BadOption

if TYPE_CHECKING:
    from biassurgery.adapters.registry import Host
    from biassurgery.data.loading import Loaded


@dataclass(frozen=True)
class Inputs:
    """A model and data for it.

    Attributes:
        host: the model, as its adapter sees it; its name and its dtype and device are in `model`.
        batches: can be iterated over more than once.
        labelled: whether images come with labels.
        model, data: what they are, for reports.
        tokenizer: of a text model.
        bos: the id of the token in front of every window; None: there is none.
        start: the id of a token that is to be put in front of every window; None: none is.
    """

    host: Host
    batches: Iterable[Any]
    labelled: bool
    model: dict[str, Any]
    data: dict[str, Any]
    tokenizer: Any = None
    bos: int | None = None
    start: int | None = None

    @property
    def reads_text(self) -> bool:
        return self.host.adapter.modality == "text"

    @property
    def front(self) -> tuple[int, ...]:
        """The token ids that the model reads in front of every window."""
        return tuple(token for token in (self.start, self.bos) if token is not None)

    @property
    def source(self) -> str:
        """What the data are, in one line."""
        return ", ".join(
            str(value) if name == "source" else f"{name} {value}"
            for name, value in self.data.items()
        )


def prepare(
    request: Request,
    packaged: Literal["calibration", "evaluation"] = "calibration",
    most: int | None = None,
    onloading: Onloading | None = None,
    longest: int | None = None,
) -> Inputs:
    """Load the model, read the data, and refuse what does not go together.

    Args:
        request: what the user asked for.
        packaged: the text that is read where none is given.
        most: tokens of text that are read where the user sets no limit; None: all.
        onloading: how a model larger than memory is read; None: it is loaded as a whole.
        longest: tokens of a window at most where the user gives no length; None: as many as the
            model was made for.

    Raises:
        SurgeryError: its message says what.
    """
    from biassurgery.adapters.devices import input_device
    from biassurgery.adapters.registry import find_host
    from biassurgery.data.loading import load_model

    dtype = None if request.dtype is None else request.dtype.value
    options = {} if onloading is None else onloading.options
    loaded = load_model(
        request.model, weights=request.weights, dtype=dtype, device=request.device, **options
    )
    host = find_host(loaded.model)
    parameter = next(loaded.model.parameters())
    model = {
        "name": loaded.name,
        "architecture": host.architecture,
        "blocks": len(host.blocks),
        "width": host.width,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(input_device(loaded.model)),
    }
    without_data = Inputs(host, [], False, model, {})
    if host.adapter.modality == "text":
        if request.images is not None:
            raise BadOption(f"images: {request.images}, but {loaded.name} reads text; give --text.")
        if request.length is None and longest is not None:
            context = host.adapter.context(host.model)
            request = replace(request, length=longest if longest < (context or 0) else None)
        return _with_text(without_data, loaded, request, packaged, most)
    if request.text or request.length or request.bos is not Bos.auto or request.start:
        raise BadOption(
            f"text, length, bos, start: {loaded.name} reads images; give --images instead."
        )
    return _with_images(without_data, request)


def _with_text(
    inputs: Inputs,
    loaded: Loaded,
    request: Request,
    packaged: Literal["calibration", "evaluation"],
    most: int | None,
) -> Inputs:
    from biassurgery.data.packaged import packaged_text
    from biassurgery.data.reading import bos_token, read_text, selected, text_windows

    if loaded.tokenizer is None:
        raise BadOption(
            f"model: {loaded.name} has no tokenizer among its files, so it cannot read text; add"
            " one, or use the library with token ids."
        )
    bos = bos_token(loaded.tokenizer, request.bos.value)
    start = _start(inputs.host, loaded.tokenizer, request.start, bos)
    texts = [read_text(path) for path in request.text or ()] or [packaged_text(packaged)]
    rows = text_windows(loaded.model, loaded.tokenizer, texts, request.length, bos, start)
    chosen = selected(len(rows), request.split.value, request.limit)
    taken = chosen if request.limit or most is None else chosen[: max(1, most // rows.shape[1])]
    data = {
        "source": ", ".join(map(str, request.text or ())) or f"packaged {packaged} text",
        "windows": len(taken),
        "length": rows.shape[1],
        "split": request.split.value,
        **_in_front(loaded.tokenizer, request, bos, start),
    }
    if len(taken) < len(chosen):
        data["left out"] = (
            f"{len(chosen) - len(taken)} windows behind the first {most:,} tokens (--max-windows"
            " sets another limit)"
        )
    batches = rows[taken].split(request.batch_size)
    read = replace(inputs, batches=batches, data=data, tokenizer=loaded.tokenizer)
    return replace(read, bos=bos, start=start)


def _in_front(
    tokenizer: Any, request: Request, bos: int | None, start: int | None
) -> dict[str, str]:
    """What stands in front of every window, in words."""
    token = "none" if bos is None else f"{_named(tokenizer, bos)} in front of every window"
    said = {"BOS": f"{token}, as the tokenizer does" if request.bos is Bos.auto else token}
    if start is not None:
        said["start"] = f"{_named(tokenizer, start)} in front of every window"
    return said


def _start(host: Host, tokenizer: Any, start: str | None, bos: int | None) -> int | None:
    """The id of the token that `--start` names."""
    from biassurgery.data.start import start_id

    if start is not None and bos is not None:
        raise BadOption(
            f"start: {start}, but {_named(tokenizer, bos)} stands in front of every window already;"
            " say --bos no, or leave --start out."
        )
    return start_id(host, int(start) if start and start.isdecimal() else start, tokenizer)


def _named(tokenizer: Any, token: int) -> str:
    return f"{tokenizer.convert_ids_to_tokens(token)} ({token})"


def _with_images(inputs: Inputs, request: Request) -> Inputs:
    from biassurgery.data.packaged import packaged_pixels
    from biassurgery.data.reading import (
        ImageBatches,
        class_count,
        image_files,
        reading_workers,
        selected,
    )

    model = inputs.host.root
    if request.images is None:
        images = packaged_pixels(model)
        taken = images[selected(len(images), request.split.value, request.limit)]
        data = {
            "source": "packaged photographs, crops and mirrors",
            "images": len(taken),
            "split": request.split.value,
        }
        return replace(inputs, batches=taken.split(request.batch_size), data=data)
    files = image_files(request.images, class_count(model))
    chosen = [files[index] for index in selected(len(files), request.split.value, request.limit)]
    batches = ImageBatches(chosen, model, request.batch_size, workers=reading_workers(model))
    data = {"source": str(request.images), "images": len(chosen), "split": request.split.value}
    return replace(inputs, batches=batches, labelled=batches.labelled, data=data)
