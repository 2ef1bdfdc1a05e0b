"""easyrl: align language models from human preferences with JAX."""
