"""From `images=` to pixels: sources, plans, reading files and decoding.

`sources` decides what `images=` is; `folders`, `lists`, `tar` and `parquet` plan which inputs go into which split;
`files` fetches their bytes; `decode` and `arrays` turn these into pixels. `pairs` matches images with masks.
"""
