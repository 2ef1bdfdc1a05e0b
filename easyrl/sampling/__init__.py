"""From prompts to responses: filters on logits, and cached decoding."""
