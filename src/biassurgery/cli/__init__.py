"""The command line `biassurgery`: a file a command, and a line here."""

from __future__ import annotations

from biassurgery.cli import (
    calibrate,
    convert,
    demonstrate,
    detect,
    diagnose,
    evaluate,
    fetch,
    listing,
    report,
)
from biassurgery.cli.group import app, register

__all__ = ["app"]

register(detect.detect)
register(calibrate.calibrate)
register(diagnose.diagnose)
register(evaluate.evaluate, "eval")
register(report.report)
register(listing.list_known, "list")
register(convert.convert)
register(fetch.fetch)
register(demonstrate.demo)
