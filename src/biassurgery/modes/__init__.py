"""The modes of `patch_model`: one frozen dataclass each; a string is sugar for one of them."""

from biassurgery.adapters.layers import Layers
from biassurgery.modes.added_token import TestTimeRegisters
from biassurgery.modes.attention import AttentionBias, Instrument, Transplant
from biassurgery.modes.base import Mode
from biassurgery.modes.massive import Noise, SetMean, SetValue, SetZero, Shuffle, ZeroRandom
from biassurgery.modes.registers import FixRegisters
from biassurgery.modes.resolve import MODES, resolve_mode

__all__ = [
    "MODES",
    "AttentionBias",
    "FixRegisters",
    "Instrument",
    "Layers",
    "Mode",
    "Noise",
    "SetMean",
    "SetValue",
    "SetZero",
    "Shuffle",
    "TestTimeRegisters",
    "Transplant",
    "ZeroRandom",
    "resolve_mode",
]
