"""The modes of `patch_model`: one frozen dataclass each; a string is sugar for one of them.

A mode is known by being defined in one of the modules imported here, or in another package.
"""

from biassurgery.adapters.layers import Layers
from biassurgery.modes.added_token import TestTimeRegisters
from biassurgery.modes.attention import AttentionBias, Instrument, Transplant
from biassurgery.modes.base import MODES as MODES
from biassurgery.modes.base import Mode
from biassurgery.modes.massive import Noise, SetMean, SetValue, SetZero, Shuffle, ZeroRandom
from biassurgery.modes.pin import Pin
from biassurgery.modes.registers import FixRegisters
from biassurgery.modes.rescale import Rescale
from biassurgery.modes.resolve import resolve_mode as resolve_mode

__all__ = [
    "AttentionBias",
    "FixRegisters",
    "Instrument",
    "Layers",
    "Mode",
    "Noise",
    "Pin",
    "Rescale",
    "SetMean",
    "SetValue",
    "SetZero",
    "Shuffle",
    "TestTimeRegisters",
    "Transplant",
    "ZeroRandom",
]
