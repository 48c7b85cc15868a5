"""How large inputs may be: checked on headers and sizes, before anything is read, built or decoded.

Every limit is far above what published models and data sets need, and keeps a refusal under 500 MB of memory. The table
of `docs/reliability.md` lists them.
"""

from __future__ import annotations

MAX_TENSORS = 1_000_000
"""Tensors of a checkpoint; the largest published ones have a fifth of it."""
MAX_HEADER = 100_000_000
"""Bytes of a safetensors header (the limit of the safetensors library), of an index, of a receipt."""
MAX_JSON = 10_000_000
"""Bytes of a config."""
MAX_LAYERS = 10_000
"""Layers or experts that a config may speak of; of layers, no more than the checkpoint has tensors."""
MAX_TENSOR_NAME = 200
"""Bytes of a tensor's name: a file of factors is called after it."""
MAX_FILE_NAME = 255
"""Bytes of the name of a shard: more than that no file system takes."""
MAX_TOKENIZER = 64_000_000
"""Bytes of a tokenizer's file; the largest published ones have half of it."""
MAX_TOKEN = 10_000
"""Characters of one token."""
MAX_TEXT_GROWTH = 64
"""Times that a tokenizer's replacements may make a text longer, all of them together."""
MAX_BEAMS = 64
"""Beams, returned sequences or drafted tokens that a generation config may ask for."""
MAX_RECIPE = 1_000_000
"""Bytes of a recipe."""
MAX_YAML_DEPTH = 32
"""Levels of a recipe."""
MAX_YAML_ALIASES = 16
"""Aliases of a recipe: nested ones grow exponentially."""
MAX_LINE = 1 << 26
"""Bytes of a line of JSON, or of a row of a parquet file on average: some carry a picture, none a film."""
MAX_PARQUET_RATIO = 100
"""Times that a column of a parquet file above `MAX_LINE` may be larger than its compressed bytes."""
MAX_DATA_JSON = 1 << 30
"""Bytes of a JSON file of questions, which is parsed at once."""
