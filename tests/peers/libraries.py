"""The libraries whose tests run on patched models: which tests, and which hold unpatched only."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Library:
    """A library's tests.

    Attributes:
        distribution: its name in the package index.
        families: what runs in one process, by name: files of tests, and pytest's `-k`.
        place: where a file of `inside/` goes beside the unpacked tests, if not under its own name.
        package: whether the unpacked tests are a package.
        needs: distributions that its tests import and that it does not bring.
        by_design: tests that pass for an unpatched model only, and why.
    """

    distribution: str
    families: dict[str, tuple[tuple[str, ...], str]]
    by_design: dict[str, str]
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
_TORCHSCRIPT = (
    "TorchScript compiles the source of a module's own class; a patched module's is made at run"
    " time: unpatch the model before scripting it"
)
_FX = (
    "torch.fx runs a forward on stand-ins for tensors, whose shapes no edit can ask for;"
    " `torch.compile` and `torch.export` trace patched models"
)

LIBRARIES = {
    "transformers": Library(
        "transformers",
        dict.fromkeys(_TRANSFORMERS, (("test_families.py",), "")),
        {
            "test_init_weights_can_init_buffers": (
                "compares with a model without weights, which is not patched"
            ),
            "test_model_weights_reload_no_missing_tied_weights": (
                "compares what `from_pretrained` reports, before the patch, with the model after"
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
            "test_model_forward_fx": _FX,
            "test_model_backward_fx": _FX,
            "test_model_forward_fx_torchscript": _FX,
            "test_relpos_family_set_input_size": (
                "wants all buffers in bfloat16; gates and levels stay float32, to compare exactly"
            ),
        },
    ),
    "open_clip": Library(
        "open_clip_torch",
        {
            "inference": (("test_inference.py",), ""),
            "training": (("test_training_simple.py",), "vit or coca or jit"),
        },
        {"test_inference_with_data[ViT-B-32-True]": _TORCHSCRIPT},
        package=False,
    ),
}
