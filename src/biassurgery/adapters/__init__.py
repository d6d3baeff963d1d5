"""The host models that this library knows: one short file a family. The most general is registered first, so it is asked last."""

from biassurgery.adapters import transformers  # isort: skip
from biassurgery.adapters import falcon, gpt2, gpt_neox, llama, mistral, mixtral, mpt, opt, phi, timm

__all__ = ["falcon", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "mpt", "opt", "phi", "timm", "transformers"]
