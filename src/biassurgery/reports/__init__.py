"""One page on one model: `biassurgery.report`."""
