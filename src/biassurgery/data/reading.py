"""From text files and image folders to batches."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from biassurgery.adapters.devices import input_device
from biassurgery.adapters.registry import find_host
from biassurgery.data.packaged import special_prefix
from biassurgery.data.transforms import Transform, image_dtype, image_transform
from biassurgery.data.windows import token_windows, tokenize
from biassurgery.errors import BadBatch, BadOption, FileError
from biassurgery.findings.files import as_path, told

Bos = Literal["auto", "yes", "no"]
Split = Literal["all", "even", "odd"]
_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_FILE_COLUMNS = ("file", "filename", "file_name", "path", "image")


def read_text(path: Path) -> str:
    """A UTF-8 text file.

    Raises:
        FileError: it cannot be read, or is something else.
    """
    path = as_path("text", path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(
            f"text: {path} cannot be read ({error}); give a text file in UTF-8."
        ) from error


def bos_token(tokenizer: Any, policy: Bos) -> int | None:
    """The token to put in front of every window; None: there is none.

    By policy: the tokenizer's own habit (`auto`), its BOS token (`yes`), or none (`no`).

    Raises:
        BadOption: `yes` without a BOS token, or a habit of several tokens.
    """
    if policy == "no":
        return None
    if policy == "yes":
        if tokenizer.bos_token_id is None:
            raise BadOption("bos: yes, but this tokenizer has no BOS token; use no.")
        return tokenizer.bos_token_id
    prefix = special_prefix(tokenizer)
    if len(prefix) > 1:
        raise BadOption(
            f"bos: auto, but this tokenizer puts {len(prefix)} tokens in front of a text; say yes"
            " or no."
        )
    return prefix[0] if prefix else None


def text_windows(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    length: int | None,
    bos: int | None,
    start: int | None = None,
) -> Tensor:
    """Windows (W, length) int64 of texts, one after the other; see `token_windows`."""
    stream = torch.cat([tokenize(tokenizer, text) for text in texts])
    return token_windows(find_host(model, "text"), stream, length, bos, start)


def selected(total: int, split: Split, limit: int | None) -> list[int]:
    """Indices of all items, or of every other one; of these the first `limit`.

    Every other one from the first (`even`) or from the second (`odd`) on.

    Raises:
        BadBatch: that leaves none.
    """
    slices = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}
    indices = range(total)[slices[split]][:limit]
    if not indices:
        raise BadBatch(
            f"split: {split} of {total} windows or images leaves none; give more data, or take all."
        )
    return list(indices)


@dataclass(frozen=True)
class ImageFile:
    """An image and its class index, if that is known."""

    path: Path
    label: int | None = None


def class_count(model: nn.Module) -> int | None:
    """How many classes an image classifier knows; None: it is none, or it does not say."""
    # Every config of transformers has num_labels.
    classifies = type(model).__name__.endswith("ForImageClassification")
    labels = model.config.num_labels if classifies else None  # type: ignore[union-attr]
    return getattr(model, "num_classes", labels)  # type: ignore[return-value]


def image_files(folder: Path, classes: int | None) -> list[ImageFile]:
    """The images of a folder, by name, with the labels that can be told.

    Labels are in `labels.csv` (columns: the file's name and `class_index`), or images are in one
    sub-folder a class. A sub-folder is named by its class index; under other names there must be
    one for each of the model's `classes`, which are then in order of name.

    Raises:
        FileError: no images, or a table that does not fit them.
    """
    folder = as_path("images", folder)
    if not folder.is_dir():
        raise FileError(f"images: {folder} is not a folder; give one that holds images.")
    if (folder / "labels.csv").is_file():
        return _from_table(folder)
    files = _images_in(folder)
    if files:
        return [ImageFile(file) for file in files]
    folders = [sub for sub in sorted(folder.iterdir()) if sub.is_dir() and _images_in(sub)]
    if not folders:
        raise FileError(
            f"images: {folder} holds no images ({', '.join(sorted(_IMAGES))}), nor do its"
            " sub-folders."
        )
    if all(sub.name.isdecimal() for sub in folders):
        labels: list[int | None] = [int(sub.name) for sub in folders]
    else:
        labels = list(range(len(folders))) if len(folders) == classes else [None] * len(folders)
    return [
        ImageFile(file, label) for sub, label in zip(folders, labels) for file in _images_in(sub)
    ]


def _images_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in _IMAGES)


def _from_table(folder: Path) -> list[ImageFile]:
    table = folder / "labels.csv"
    try:
        with table.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            columns = reader.fieldnames or ()
            name = next((column for column in _FILE_COLUMNS if column in columns), None)
            if name is None or "class_index" not in columns:
                raise FileError(
                    f"images: {table} has the columns {reader.fieldnames}; it needs file and"
                    " class_index."
                )
            files = [ImageFile(folder / row[name], int(row["class_index"])) for row in reader]
    except FileError:
        raise
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise FileError(
            f"images: {table} cannot be read ({error}); give one line a file, with its class as a"
            " number."
        ) from error
    absent = [file.path.name for file in files if not os.path.isfile(file.path)]  # never raises
    if absent or not files:
        raise FileError(
            f"images: {table} names {len(files)} files, of which {len(absent)} are absent"
            f" {absent[:3]}; complete the folder."
        )
    return sorted(files, key=lambda file: file.path)


def reading_workers(model: nn.Module) -> int:
    """How many processes should read images: as many as there are cores, but at most 8.

    0 where the model itself needs the cores.
    """
    return 0 if input_device(model).type == "cpu" else min(8, torch.get_num_threads())


class ImageBatches:
    """Batches of image files, read and prepared anew each time they are iterated over.

    For a model on a GPU they are pinned on the way.

    Yields (B, 3, H, W) tensors in the model's dtype, paired with (B,) int64 labels if all files
    have one.

    Args:
        files: what to read, in order.
        model: whom for.
        batch_size: images a batch.
        transform: from a photograph (PIL, RGB) to (3, H, W); None: the model's own, see
            `image_transform`.
        workers: processes that read ahead; 0: this one reads, when a batch is asked for.

    Raises:
        BadOption: no transform, and the model's own is not known.
        FileError: while iterating, an image that cannot be read.
    """

    def __init__(
        self,
        files: Sequence[ImageFile],
        model: nn.Module,
        batch_size: int,
        *,
        transform: Transform | None = None,
        workers: int = 0,
    ) -> None:
        self.files = files
        self.batch_size = batch_size
        self.workers = workers
        self.labelled = all(file.label is not None for file in files)
        self.dtype = image_dtype(model) or torch.float32
        self.pinned = input_device(model).type == "cuda"
        self._photographs = _Photographs(files, transform or image_transform(model))

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        loader = DataLoader(
            self._photographs,
            self.batch_size,
            num_workers=self.workers,
            pin_memory=self.pinned,
            collate_fn=self._batch,
        )
        for batch in loader:
            if isinstance(batch, FileError):
                raise batch
            yield batch

    def _batch(
        self, items: list[tuple[Tensor, int | None] | FileError]
    ) -> Tensor | tuple[Tensor, Tensor] | FileError:
        read = [item for item in items if not isinstance(item, FileError)]
        if len(read) < len(items):
            return next(item for item in items if isinstance(item, FileError))
        pixels = torch.stack([image for image, _ in read]).to(self.dtype)
        return (pixels, torch.tensor([label for _, label in read])) if self.labelled else pixels


class _Photographs(Dataset[Any]):
    """A dataset of image files, in which an error is an item like others.

    Raised in another process it would come back inside a traceback.
    """

    def __init__(self, files: Sequence[ImageFile], transform: Transform) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int | None] | FileError:
        from PIL import Image

        file = self.files[index]
        if not file.path.is_file():
            return FileError(f"images: {file.path} is not a file; remove or replace it.")
        try:
            with Image.open(file.path) as image:
                photograph = image.convert("RGB")
        except Exception as error:  # noqa: BLE001 its decoders of damaged files raise anything
            return FileError(
                f"images: {file.path} cannot be read ({told(error)}); remove or replace it."
            )
        return self.transform(photograph), file.label
