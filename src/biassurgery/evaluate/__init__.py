"""What a model is worth, and what a patch does to it: perplexity, top-1 accuracy, and the intervention table."""

from biassurgery.evaluate.accuracy import top1_accuracy
from biassurgery.evaluate.compare import Comparison, compare
from biassurgery.evaluate.perplexity import perplexity
from biassurgery.evaluate.streaming import streaming_perplexity

__all__ = ["Comparison", "compare", "perplexity", "streaming_perplexity", "top1_accuracy"]
