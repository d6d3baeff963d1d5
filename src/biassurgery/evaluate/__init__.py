"""What a model is worth, and what a patch does to it: perplexity, accuracies, comparison."""

from biassurgery.evaluate.accuracy import top1_accuracy
from biassurgery.evaluate.features import class_and_patch_features, image_features
from biassurgery.evaluate.interventions import Comparison, compare
from biassurgery.evaluate.knn import knn_accuracy
from biassurgery.evaluate.language import perplexity
from biassurgery.evaluate.linear import LinearHead, fit_linear_head, linear_accuracy
from biassurgery.evaluate.zero_shot import imagenet_prompts, zero_shot_accuracy, zero_shot_head
from biassurgery.measure.mean_logits import mean_attention_logits
from biassurgery.streaming.perplexity import streaming_perplexity

__all__ = [
    "Comparison",
    "LinearHead",
    "class_and_patch_features",
    "compare",
    "fit_linear_head",
    "image_features",
    "imagenet_prompts",
    "knn_accuracy",
    "linear_accuracy",
    "mean_attention_logits",
    "perplexity",
    "streaming_perplexity",
    "top1_accuracy",
    "zero_shot_accuracy",
    "zero_shot_head",
]
