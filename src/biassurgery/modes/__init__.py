"""The modes of `patch_model`: one frozen dataclass each; a string is sugar for one of them.

A mode is known by being defined in one of the modules imported here, or in another package.
"""

from typing import TYPE_CHECKING

from biassurgery.adapters.layers import Layers as Layers
from biassurgery.modes import added_token, attention, massive, registers  # noqa: F401
from biassurgery.modes.base import MODES as MODES
from biassurgery.modes.base import Mode as Mode
from biassurgery.modes.resolve import resolve_mode as resolve_mode

if TYPE_CHECKING:  # what the next line does, for those who read types
    from biassurgery.modes.added_token import *  # noqa: F403
    from biassurgery.modes.attention import *  # noqa: F403
    from biassurgery.modes.massive import *  # noqa: F403
    from biassurgery.modes.registers import *  # noqa: F403

globals().update({mode.__name__: mode for mode in MODES.defined().values()})
