"""What packages that extend this library import: the bases of everything that comes in kinds.

- `Adapter`, `TextAdapter`, `ImageAdapter`: a model that is not known yet, with `register_adapter`;
  its attention is described by `Attention`, `Shape` and one of the routes to the core.
- `Mode`, `SiteMode`, `WriteMode`, `AttentionMode`: a mode of `patch_model`.
- `Bias`: a kind of explicit bias of the mode `attention_bias`.
- `BlockEdit`, `AttentionEdit`: what a mode does to one module; `layer_indices`, `all_or_indices`
  and `attentions` turn the layers that a caller asks for into modules.
- `Statistic`: something that `detect` counts; it is shown each `BlockOutput` and adds up `Sums`.
- `Format`: a format of `export`.
- `BlockQuantity`, `AttentionQuantity`: something that `record` records, of the residual stream or
  of a `SeenAttention`.

A class is known by being defined. So that it is found without an import, name its module under the
entry-point group `biassurgery.extensions` of your package.
"""

from biassurgery.adapters.attentions import attentions
from biassurgery.adapters.base import Adapter
from biassurgery.adapters.image import ImageAdapter
from biassurgery.adapters.layers import Layers, all_or_indices, layer_indices
from biassurgery.adapters.registry import Host, register_adapter
from biassurgery.adapters.text import TextAdapter
from biassurgery.edits.bias import Bias, Initial
from biassurgery.exports.formats import Format
from biassurgery.findings.sums import Sums
from biassurgery.measure.quantities import AttentionQuantity, BlockQuantity
from biassurgery.measure.seen import SeenAttention
from biassurgery.measure.statistic import BlockOutput, Statistic
from biassurgery.modes.attention import AttentionMode
from biassurgery.modes.base import Mode
from biassurgery.modes.massive import SiteMode, WriteMode
from biassurgery.ops.columns import Columns
from biassurgery.surgery.attention import Attention, AttentionEdit, EditedAttention, Shape
from biassurgery.surgery.block import BlockEdit
from biassurgery.surgery.call import Call
from biassurgery.surgery.edit import Place
from biassurgery.surgery.multihead import ThroughMultihead
from biassurgery.surgery.routes import ThroughInterface, ThroughSdpa

__all__ = [
    "Adapter",
    "Attention",
    "AttentionEdit",
    "AttentionMode",
    "AttentionQuantity",
    "Bias",
    "BlockEdit",
    "BlockOutput",
    "BlockQuantity",
    "Call",
    "Columns",
    "EditedAttention",
    "Format",
    "Host",
    "ImageAdapter",
    "Initial",
    "Layers",
    "Mode",
    "Place",
    "SeenAttention",
    "Shape",
    "SiteMode",
    "Statistic",
    "Sums",
    "TextAdapter",
    "ThroughInterface",
    "ThroughMultihead",
    "ThroughSdpa",
    "WriteMode",
    "all_or_indices",
    "attentions",
    "layer_indices",
    "register_adapter",
]
