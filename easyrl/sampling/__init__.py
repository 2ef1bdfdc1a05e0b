"""Text from a model: prefill, cached decoding, the choice of the next token."""
