"""How many FLOPs a model cannot do without: products with its weights, and attention to what may be attended to.

Counted as 2 a multiply-add, over all devices. A backward pass costs twice its forward pass; what a remat policy
recomputes is not necessary, and padding, masked attention and work done on several devices alike are not either.
"""

import dataclasses
import math
from collections.abc import Iterable

import jax

from easyrl.core.params import is_spec
from easyrl.models.config import ModelConfig
from easyrl.models.families import param_specs

# A matrix is a parameter that joins the residual stream to one of these.
INNER = {"heads", "kv_heads", "mlp"}


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """What a forward pass costs, from a model's shapes."""

    cfg: ModelConfig

    @property
    def per_token(self) -> int:
        """Products with the layers' weights for one token."""
        specs = jax.tree.leaves(param_specs(self.cfg, "lm")["layers"], is_leaf=is_spec)
        return 2 * sum(math.prod(spec.shape) for spec in specs if "embed" in spec.axes and INNER & set(spec.axes))

    @property
    def head(self) -> int:
        """The logits of one token."""
        return 2 * self.cfg.width * self.cfg.vocab_size

    @property
    def per_pair(self) -> int:
        """One token attending to one other (or itself), in all layers: its product with the key and with the value."""
        return 4 * self.cfg.num_layers * self.cfg.num_heads * self.cfg.head_size

    def sequence(self, length: float, *, logits: float = 0.0) -> float:
        """A pass over one sequence, with the logits of `logits` of its tokens."""
        pairs = length * (length + 1) / 2
        window = self.cfg.sliding_window
        if window is not None and window < length:
            full = pairs
            banded = window * (window + 1) / 2 + (length - window) * window
            share = sum(self.cfg.sliding_layers or (True,)) / len(self.cfg.sliding_layers or (True,))
            pairs = share * banded + (1 - share) * full
        return length * self.per_token + pairs * self.per_pair + logits * self.head

    def sequences(self, lengths: Iterable[int], *, logits: float = 0.0) -> float:
        """A pass over sequences of these lengths, with the logits of `logits` of all their tokens."""
        return sum(self.sequence(int(length)) for length in lengths) + float(logits) * self.head

    def decoding(self, prompt: float, new_tokens: float) -> float:
        """`new_tokens` steps of one token each, behind a prompt of which the cache holds the keys."""
        pairs = new_tokens * prompt + new_tokens * (new_tokens + 1) / 2
        return new_tokens * (self.per_token + self.head) + pairs * self.per_pair
