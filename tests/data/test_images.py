"""Folders of images through the loaders of torchvision and timm and this library's own, and the
transforms of each kind of model.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from biassurgery.data.reading import (
    ImageBatches,
    ImageFile,
    class_count,
    image_files,
    reading_workers,
)
from biassurgery.data.transforms import image_transform
from biassurgery.errors import BadOption, FileError
from biassurgery.evaluate import knn_accuracy, top1_accuracy
from tests.state import bits
from tests.tiny_vision import CLASSES, double, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in the layout of ImageNet: a sub-folder a class, of which there are as many as the tiny
    models know.
    """
    from PIL import Image

    root = tmp_path_factory.mktemp("imagenet")
    generator = torch.Generator().manual_seed(4)
    for label in range(CLASSES):
        (root / f"n{label:02}").mkdir()
        for number in range(2):
            pixels = torch.randint(256, (40, 48, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).resize((96, 80)).save(
                root / f"n{label:02}" / f"{number}.png"
            )
    return root


def prepare(size: int = 28) -> Any:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize(32),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(0.5, 0.25),
        ]
    )


def read_by_hand(folder: Path) -> tuple[Tensor, list[int]]:
    from PIL import Image

    files = [
        (file, int(sub.name[1:]))
        for sub in sorted(folder.iterdir())
        for file in sorted(sub.iterdir())
    ]
    return torch.stack([prepare()(Image.open(file).convert("RGB")) for file, _ in files]), [
        label for _, label in files
    ]


def share_by_hand(model: Any, folder: Path) -> float:
    pixels, labels = read_by_hand(folder)
    with torch.no_grad():
        said = double(model)(pixels.double()).argmax(1).tolist()
    share = sum(a == b for a, b in zip(said, labels)) / len(labels)
    assert 0 < share < 1
    return share


def agreeable(folder: Path) -> Any:
    """A tiny classifier that gets some of the folder right: a head fitted on every second image
    with noise in it.
    """
    model = tiny("timm")
    pixels, labels = read_by_hand(folder)
    with torch.no_grad():
        read = model.forward_head(model.forward_features(pixels), pre_logits=True)
        model.head.weight.zero_()
        for row, label in list(zip(read, labels))[::3]:
            model.head.weight[label] += row - read.mean(0)
        model.head.bias.zero_()
    return model


def test_torchvisions_folders_and_loaders(folder: Path) -> None:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    model = agreeable(folder)
    loader: Any = DataLoader(ImageFolder(str(folder), prepare()), batch_size=4, num_workers=1)
    assert top1_accuracy(model, loader) == share_by_hand(model, folder)
    assert knn_accuracy(model, loader, loader, k=1) == 1.0


@pytest.mark.parametrize("prefetcher", [True, False])
def test_timms_datasets_and_loaders(folder: Path, prefetcher: bool) -> None:
    from timm.data import create_dataset, create_loader  # type: ignore[attr-defined]

    model = agreeable(folder)
    loader: Any = create_loader(
        create_dataset("", root=str(folder)),
        input_size=(3, 28, 28),
        batch_size=4,
        use_prefetcher=prefetcher,
        num_workers=1,
        device=torch.device("cpu"),
        crop_pct=0.875,
        interpolation="bilinear",
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    pixels, labels = zip(*loader)
    assert torch.cat(labels).tolist() == [label for label in range(CLASSES) for _ in range(2)]
    with torch.no_grad():
        expected = model(torch.cat(pixels)).argmax(1).eq(torch.cat(labels)).double().mean().item()
    assert 0 < expected < 1
    assert top1_accuracy(model, loader) == expected
    assert knn_accuracy(model, loader, loader, k=1) == 1.0


@pytest.mark.parametrize("workers", [0, 2])
def test_image_batches(folder: Path, workers: int) -> None:
    model = agreeable(folder)
    files = image_files(folder, CLASSES)
    batches = ImageBatches(files, model, 4, transform=prepare(), workers=workers)
    pixels, labels = read_by_hand(folder)
    for _ in range(2):
        found = list(batches)
        assert bits(torch.cat([x for x, _ in found])) == bits(pixels)  # type: ignore[misc]
        assert torch.cat([y for _, y in found]).tolist() == labels  # type: ignore[misc]
    assert top1_accuracy(model, batches) == share_by_hand(model, folder)  # type: ignore[arg-type]
    assert bits(next(iter(pickle.loads(pickle.dumps(batches))))[0]) == bits(
        pixels[:4]
    )  # so that it can be sent to a worker


def test_who_reads_and_how_many_classes_there_are() -> None:
    assert class_count(tiny("timm")) == class_count(tiny("dinov2_classifier")) == CLASSES
    assert class_count(tiny("dinov2")) is class_count(tiny("clip")) is None
    assert reading_workers(tiny("timm")) == 0  # on the CPU the model needs the cores


def test_an_image_that_a_worker_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(FileError, match=r"^images: \S*broken\.png cannot be read"):
        list(ImageBatches([ImageFile(tmp_path / "broken.png")], tiny("timm"), 1, workers=1))


def test_transforms_of_timm(folder: Path) -> None:
    from PIL import Image
    from timm.data import create_transform  # type: ignore[attr-defined]

    photograph = Image.open(folder / "n00" / "0.png")
    model = tiny("timm")  # built for 28 x 28, which no pretrained config says
    expected: Any = create_transform(
        (3, 28, 28),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    assert bits(image_transform(model)(photograph)) == bits(expected(photograph))
    with torch.no_grad():
        assert model(image_transform(model)(photograph)[None]).shape == (1, CLASSES)


def test_transforms_of_open_clip(folder: Path) -> None:
    import open_clip
    from PIL import Image

    photograph = Image.open(folder / "n00" / "0.png")
    model = tiny("open_clip")
    with pytest.raises(
        BadOption,
        match=r"how CLIP wants its images prepared is not known(.|\n)*transforms.Resize",
    ):
        image_transform(model)
    open_clip.set_model_preprocess_cfg(
        model,
        {"size": 28, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "interpolation": "bilinear"},
    )
    expected: Any = open_clip.image_transform(
        28, False, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), interpolation="bilinear"
    )
    assert bits(image_transform(model)(photograph)) == bits(expected(photograph))


def test_transforms_of_transformers(folder: Path, tmp_path: Path) -> None:
    import transformers as tf
    from PIL import Image

    photograph = Image.open(folder / "n00" / "0.png")
    tiny("dinov2").save_pretrained(tmp_path)
    model = tf.Dinov2Model.from_pretrained(tmp_path)
    with pytest.raises(BadOption, match="has no image processor"):
        image_transform(model)
    with pytest.raises(BadOption, match="how Dinov2Model wants its images prepared is not known"):
        image_transform(tiny("dinov2"))
    processor: Any = tf.BitImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.4] * 3,
        image_std=[0.3] * 3,
    )
    processor.save_pretrained(tmp_path)
    found = image_transform(model)(photograph)
    expected = tf.AutoImageProcessor.from_pretrained(tmp_path)(
        images=photograph, return_tensors="pt"
    )["pixel_values"][0]
    assert bits(found) == bits(expected)
    assert found.shape == (3, 28, 28)
    files = image_files(folder, CLASSES)
    assert (
        knn_accuracy(model, ImageBatches(files, model, 5), ImageBatches(files, model, 5), k=1)
        == 1.0
    )  # type: ignore[arg-type]
