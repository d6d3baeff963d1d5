"""How a module is changed and put back: edits of blocks, attentions, linear layers, models."""
