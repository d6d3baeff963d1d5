"""What a model is worth, and what a patch does to it: perplexity, accuracies, comparison.

Also the analyses of the paper that are neither a detection nor a diagnosis: its tables of hidden
states, outlier features beside massive activations, attention logits, what sinks send, and the life
of one value. They return plain data; `plots` draws them.
"""

from biassurgery.evaluate.accuracy import top1_accuracy
from biassurgery.evaluate.features import class_and_patch_features, image_features
from biassurgery.evaluate.interventions import Comparison, compare
from biassurgery.evaluate.knn import knn_accuracy
from biassurgery.evaluate.language import perplexity
from biassurgery.evaluate.linear import LinearHead, fit_linear_head, linear_accuracy
from biassurgery.evaluate.zero_shot import imagenet_prompts, zero_shot_accuracy, zero_shot_head
from biassurgery.measure.channels import channel_table
from biassurgery.measure.mean_logits import mean_attention_logits
from biassurgery.measure.sink_kinds import sink_kinds
from biassurgery.measure.state_tables import hidden_state_tables
from biassurgery.measure.value_life import value_life
from biassurgery.streaming.perplexity import streaming_perplexity

__all__ = [
    "Comparison",
    "LinearHead",
    "channel_table",
    "class_and_patch_features",
    "compare",
    "fit_linear_head",
    "hidden_state_tables",
    "image_features",
    "imagenet_prompts",
    "knn_accuracy",
    "linear_accuracy",
    "mean_attention_logits",
    "perplexity",
    "sink_kinds",
    "streaming_perplexity",
    "top1_accuracy",
    "value_life",
    "zero_shot_accuracy",
    "zero_shot_head",
]
