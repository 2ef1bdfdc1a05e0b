"""Number formats by the names flags use."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
