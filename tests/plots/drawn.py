"""What is drawn, and reading it off a figure."""

from __future__ import annotations

from io import BytesIO

from tests.models import (
    IMAGE,
)

SIDE = IMAGE // 7


def rendered(figure):
    """The figure, after it has been drawn in full."""
    figure.savefig(stream := BytesIO(), format="png")
    assert stream.getvalue().startswith(b"\x89PNG")
    return figure
