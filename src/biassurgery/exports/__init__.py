"""What runs without this library: `export`, and its formats, one class each.

A format is known by being defined in one of the modules imported here, or in another package.
"""

from biassurgery.exports.cartridge import Cartridge as Cartridge
from biassurgery.exports.checkpoint import Checkpoint as Checkpoint
from biassurgery.exports.formats import FORMATS as FORMATS
from biassurgery.exports.formats import Format
from biassurgery.exports.prefix import Prefix as Prefix
from biassurgery.exports.sinks import Sinks as Sinks
from biassurgery.exports.write import export

__all__ = ["Format", "export"]
