"""The libraries whose tests run on patched models: which tests, and which hold unpatched only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

VARIANTS = ("instrument", "zero_effect", "out_of_reach")
ADDING = ("zero_effect",)  # it adds parameters
HOLDING = ("zero_effect", "out_of_reach")  # they add parameters or buffers


class Reason(NamedTuple):
    """Why a test passes for an unpatched model only, and under which variants that is so."""

    why: str
    variants: tuple[str, ...] = VARIANTS


@dataclass(frozen=True)
class Library:
    """A library's tests.

    Attributes:
        distribution: its name in the package index.
        families: what runs in one process, by name: files of tests, and pytest's `-k`.
        place: where a file of `inside/` goes beside the unpacked tests, if not under its own name.
        package: whether the unpacked tests are a package.
        needs: distributions that its tests import and that it does not bring.
        by_design: tests that pass for an unpatched model only, and why; with parameters in their
            names where others of the same name pass.
    """

    distribution: str
    families: dict[str, tuple[tuple[str, ...], str]]
    by_design: dict[str, Reason]
    place: dict[str, str] = field(default_factory=dict)
    package: bool = True
    needs: tuple[str, ...] = ()


_TRANSFORMERS = (
    *("llama", "gpt2", "gemma3", "qwen3", "mistral", "phi3", "olmo2", "gpt_oss"),
    *("clip", "dinov2"),
)

# Small plain vision transformers, one with a distillation token, one rotary; those of a few tests
# whose names have no model in them. Nothing is downloaded, and models without weights are not ours.
_TIMM_MODELS = (
    "(test_vit or deit_tiny_distilled_patch16_224 or eva02_tiny_patch14_224)"
    " and not pretrained and not test_model_inference and not default_cfgs"
)
_TORCHSCRIPT = Reason(
    "TorchScript compiles the source of a module's own class; a patched module's is made at run"
    " time: unpatch the model before scripting it"
)
_FX = Reason(
    "torch.fx runs a forward on stand-ins for tensors, whose shapes no edit can ask for;"
    " `torch.compile` and `torch.export` trace patched models"
)
_STRICT = Reason(
    "timm loads a file that holds the added parameters into a model without them, strictly;"
    " `load_patch` brings them",
    ADDING,
)
_LOADED_STRICTLY = (
    "test_adapted_resized_model_hub_roundtrip",
    "test_default_resize_hub_roundtrip",
    "test_export_does_not_inherit_training_regularization",
    "test_export_requires_serializable_architecture_options",
    "test_export_tracks_reset_classifier_structure",
    "test_flexible_model_export_keeps_nominal_grid_and_preprocessing_separate",
    "test_native_checkpoint_file_overrides_custom_load_source",
    "test_naflexvit_factory_remaps_classic_vit_checkpoint",
    "test_naflexvit_native_checkpoint_uses_factory_loader",
)

LIBRARIES = {
    "transformers": Library(
        "transformers",
        dict.fromkeys(_TRANSFORMERS, (("test_families.py",), "")),
        {
            "test_init_weights_can_init_buffers": Reason(
                "compares with a model without weights, which is not patched", HOLDING
            ),
            "test_headmasking": Reason(
                "transformers 4 alone: shares of attention times a mask of heads, behind the"
                " softmax; refused under what changes or watches attention",
                ("instrument", "zero_effect"),
            ),
            **dict.fromkeys(
                (
                    "test_head_pruning",
                    "test_head_pruning_integration",
                    "test_head_pruning_save_load_from_config_init",
                    "test_head_pruning_save_load_from_pretrained",
                ),
                Reason(
                    "transformers 4 alone: heads are pruned of a patched model, whose biases have"
                    " one for each head there was; refused: prune first",
                    ADDING,
                ),
            ),
            "test_model_weights_reload_no_missing_tied_weights": Reason(
                "compares what `from_pretrained` reports, before the patch, with the model after",
                ADDING,
            ),
        },
        place={
            "families.py": "test_families.py",
            "generation.py": "generation/test_utils.py",
            "exports.py": "exporters/test_export.py",
        },
        needs=("parameterized",),
    ),
    "timm": Library(
        "timm",
        {
            "models": (("test_models.py",), _TIMM_MODELS),
            "others": (("test_model_input.py", "test_checkpoint_loading.py", "test_utils.py"), ""),
        },
        {
            "test_model_forward_torchscript": _TORCHSCRIPT,
            "test_vit_classifier_pruned_features": _TORCHSCRIPT,
            "test_model_forward_fx": _FX,
            "test_model_backward_fx": _FX,
            "test_model_forward_fx_torchscript": _FX,
            "test_relpos_family_set_input_size": Reason(
                "wants all buffers in bfloat16; gates and levels stay float32, never rounded",
                ("out_of_reach",),
            ),
            **dict.fromkeys(_LOADED_STRICTLY, _STRICT),
        },
    ),
    "open_clip": Library(
        "open_clip_torch",
        {
            "inference": (("test_inference.py",), ""),
            "training": (("test_training_simple.py",), "vit or coca or jit"),
        },
        {
            "test_inference_with_data[ViT-B-32-True]": _TORCHSCRIPT,
        },
        package=False,
        needs=("braceexpand", "webdataset"),
    ),
}
