"""Limits on the size of inputs, checked on headers and sizes before anything is read, built or decoded.

Every limit is far above what published models and data sets need, and keeps a refusal under 500 MB of memory. The table
of `docs/reliability.md` lists them.
"""

from __future__ import annotations

MAX_TENSORS = 1_000_000
"""Tensors of a checkpoint; the largest published ones have a fifth of this."""
MAX_HEADER = 100_000_000
"""Bytes of a safetensors header (the limit of the safetensors library), of an index, of a receipt."""
MAX_JSON = 10_000_000
"""Bytes of a config."""
MAX_LAYERS = 10_000
"""Layers or experts that a config may declare; layers are also limited to the checkpoint's number of tensors."""
MAX_TENSOR_NAME = 200
"""Bytes of a tensor's name, which also names its file of factors."""
MAX_FILE_NAME = 255
"""Bytes of a shard's name; no file system accepts more."""
MAX_TOKENIZER = 64_000_000
"""Bytes of a tokenizer's file; the largest published ones have half of this."""
MAX_TOKEN = 10_000
"""Characters of one token."""
MAX_TEXT_GROWTH = 64
"""Factor by which all of a tokenizer's replacements together may lengthen a text."""
MAX_BEAMS = 64
"""Beams, returned sequences or drafted tokens that a generation config may ask for."""
MAX_RECIPE = 1_000_000
"""Bytes of a recipe."""
MAX_YAML_DEPTH = 32
"""Nesting levels of a recipe."""
MAX_YAML_ALIASES = 16
"""Aliases of a recipe: nested ones grow exponentially."""
MAX_LINE = 1 << 26
"""Bytes of a JSON line, or of an average row of a parquet file: a row may hold a picture, but not a film."""
MAX_PARQUET_RATIO = 100
"""Largest ratio of a parquet column's size to its compressed size, for columns above `MAX_LINE`."""
MAX_DATA_JSON = 1 << 30
"""Bytes of a JSON file of questions, which is parsed at once."""
