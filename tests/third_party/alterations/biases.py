"""A kind of explicit bias; found by the entry point in pyproject.toml."""

from biassurgery.extend import Bias


class OutputScale(Bias):
    kind = "output_scale"

    def build(self, shape, initial):
        self.scale = initial(shape.heads)

    def change(self, call, out, attention_input):
        return out * (1 + self.scale[:, None, None]).to(out.dtype)
