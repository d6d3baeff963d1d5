"""What an edit does: massive values, registers, added tokens, explicit biases, transplant."""
