"""From `images=` to pixels: sources, what goes where, reading and decoding."""
