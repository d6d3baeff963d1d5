"""What is found here, in the terms of libraries that quantise; they do it, not this one."""
