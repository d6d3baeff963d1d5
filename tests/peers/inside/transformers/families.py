"""The common tests of transformers on one family, named by the environment.

Becomes `test_families.py` beside them.
"""

from __future__ import annotations

import os
import unittest

from .generation.test_utils import GenerationTesterMixin
from .test_modeling_common import ModelTesterMixin
from .testers import FAMILIES, Tester

FAMILY = FAMILIES[os.environ["PEERS_FAMILY"]]


class _Common(ModelTesterMixin):
    all_model_classes = Tester(FAMILY).classes()
    test_resize_embeddings = FAMILY.modality == "text"
    has_attentions = True

    def setUp(self) -> None:
        self.model_tester = Tester(FAMILY)


_MIXINS = (_Common, GenerationTesterMixin) if FAMILY.modality == "text" else (_Common,)
FamilyTest = type("FamilyTest", (*_MIXINS, unittest.TestCase), {"__module__": __name__})
