"""How far the two sequences of a pair are alike, so that a model need not compute that part twice."""

import numpy as np


def tokens_alike(tokens: np.ndarray, mask: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int [B / 2]: the tokens with which sequences 2i and 2i + 1 begin alike, short of the prompt's last one.

    That one predicts the first token of an answer, and a loss reads both in one sequence: each keeps its own.

    Args:
      tokens: int [B, T], right-padded.
      mask: bool [B, T], True at t where tokens[b, t + 1] is a token of an answer.
      lengths: int [B], 0 for a filler.
    """
    differ = tokens[::2] != tokens[1::2]
    same = np.where(differ.any(axis=1), differ.argmax(axis=1), tokens.shape[1])
    before_answers = np.where(mask.any(axis=1), mask.argmax(axis=1), lengths - 1).reshape(-1, 2).min(axis=1)
    return np.maximum(np.minimum(same, before_answers), 0)
