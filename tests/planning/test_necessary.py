"""Necessary FLOPs against sums over tokens written out."""

import dataclasses

import numpy as np
import pytest

from easyrl.planning.necessary import ForwardFlops
from tests.tiny import tiny_config

CFG = tiny_config()  # L 2, D 16, N 4, K 2, H 8, F 24, V 40


def test_products_with_weights():
    attention = 16 * 4 * 8 + 2 * 16 * 2 * 8 + 4 * 8 * 16
    assert ForwardFlops(CFG).per_token == 2 * 2 * (attention + 3 * 16 * 24)
    assert ForwardFlops(CFG).head == 2 * 16 * 40


@pytest.mark.parametrize("window", [None, 3])
def test_a_sequence_is_the_sum_over_its_tokens(window):
    flops = ForwardFlops(dataclasses.replace(CFG, sliding_window=window))
    seen = [min(t + 1, window or 99) for t in range(10)]
    pair = 2 * 2 * 4 * 8 * 2  # two products, in both layers
    assert flops.sequence(10, logits=4) == 10 * flops.per_token + sum(seen) * pair + 4 * flops.head


def test_a_pass_over_several_sequences_is_the_sum_of_passes():
    flops = ForwardFlops(CFG)
    assert flops.sequences(np.array([3, 5]), logits=4) == flops.sequence(3, logits=1) + flops.sequence(5, logits=3)


def test_decoding_goes_on_where_the_prompt_ends():
    flops = ForwardFlops(CFG)
    whole, prompt = flops.sequence(10, logits=10), flops.sequence(6, logits=6)
    assert flops.decoding(6, 4) == whole - prompt
