"""What all figures share: an empty one, and images as they can be drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from biassurgery.errors import BadOption, MissingPackage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart; on paper they differ in lightness.
BLUE = "#0072b2"
RED = "#d55e00"
GREEN = "#009e73"
GREY = "0.45"
_DPI = 160
# What byte-level and SentencePiece tokenizers write for a space and a line break.
_MARKS = str.maketrans({"Ġ": "␣", "▁": "␣", "Ċ": "↵", "\n": "↵", "$": r"\$"})


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, that no window and no pyplot knows of."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackage(
            "plots: matplotlib is not installed; pip install 'biassurgery[report]', or matplotlib"
            " itself."
        ) from error
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def plain(axes: Any, title: str, x: str, y: str) -> None:
    """The common look of a panel with two axes."""
    axes.set_title(title, fontsize=10, pad=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def few_ticks(axis: Any, decades: float) -> None:
    """Ticks of a logarithmic axis that do not touch, and read as numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=9))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def legend_beside(axes: Any) -> None:
    """A legend to the right of a panel, where it covers nothing."""
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def readable(token: str | None) -> str:
    """A token string as a label: spaces and line breaks seen, and no mathematics.

    None is what a tokenizer has for an id beyond its vocabulary, of which models may have more.
    """
    if token is None:
        return "?"
    spaces = len(token) - len(token.lstrip(" "))
    return "␣" * spaces + token[spaces:].translate(_MARKS)


def pixels_of(image: Any) -> Tensor:
    """An image as (H, W, 3) float32 from 0 to 1, on the CPU.

    Args:
        image: a tensor (3, H, W) as a model reads it, whose darkest value becomes 0 and brightest
            1; or a PIL image.

    Raises:
        BadOption: something else.
    """
    if isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] != 3:
            raise BadOption(
                f"image: a tensor of shape {tuple(image.shape)}; give one image (3, H, W)."
            )
        pixels = image.detach().float().cpu().permute(1, 2, 0)
        low, high = pixels.aminmax()
        return (pixels - low) / (high - low).clamp(min=1e-12)
    if not hasattr(image, "convert"):
        raise BadOption(f"image: a {type(image).__name__}; give a tensor (3, H, W) or a PIL image.")
    rgb = image.convert("RGB")
    values = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return values.view(rgb.height, rgb.width, 3) / 255
