"""The bundled tiny models, tokenizer and prompts of the quickstart."""
