"""Sites by hand and by calibration."""

from __future__ import annotations

import math

import biassurgery as bs
from tests import models

HAND_MADE = bs.Sites(
    [
        bs.Site(layer=1, channel=7, role="start", mean=3000.0),
        bs.Site(
            layer=1,
            channel=7,
            role="elsewhere",
            mean=-9000.5,
            std=12.25,
            count=40,
            gate=750.0,
            margin=13591.0,
            cluster=1,
        ),
        bs.Site(
            layer=4,
            channel=63,
            role="start",
            mean=1 / 3,
            std=1e-300,
            count=2**40,
            gate=0.1,
            margin=math.inf,
        ),
    ],
    origin=bs.Origin("llama", 5, 64, ("start", "elsewhere"), 100.0, 1000.0, "ünïcode text"),
)


def calibrated(seed: int = 1, **options) -> bs.Sites:
    return bs.calibrate(models.planted("llama"), [models.tokens(seed=seed)], **options)
