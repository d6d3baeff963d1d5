"""What packages that extend this library import."""

from biassurgery.adapters.image import ImageAdapter
from biassurgery.adapters.registry import register_adapter
from biassurgery.adapters.text import TextAdapter
from biassurgery.surgery.attention import Attention, Shape
from biassurgery.surgery.routes import ThroughInterface, ThroughSdpa

__all__ = [
    "Attention",
    "ImageAdapter",
    "Shape",
    "TextAdapter",
    "ThroughInterface",
    "ThroughSdpa",
    "register_adapter",
]
