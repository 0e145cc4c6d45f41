"""An interpolated n-gram language model with modified Kneser-Ney smoothing, as a yardstick.

Source: Chen & Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling", TR-10-98, Harvard 1998,
section 3 (https://dash.harvard.edu/handle/1/25104739).
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from rlhf.errors import InputError


class Order(NamedTuple):
    """The k-grams of one order; a k-gram of token ids t₁ … t_k is the number t₁·V^(k-1) + … + t_k."""

    grams: np.ndarray  # (G,) int64, sorted
    kept: np.ndarray  # (G,) float64: its count minus the discount, over the count of its context
    contexts: np.ndarray  # (C,) int64, sorted: the (k-1)-grams that something follows
    passed: np.ndarray  # (C,) float64: the share of probability that goes to the next lower order


def discounts(counts: np.ndarray) -> np.ndarray:
    """The discounts of counts of 1, 2, and 3 or more, from the counts of counts n₁ … n₄ (equation 26).

    Y = n₁/(n₁ + 2n₂); D₁ = 1 - 2Y n₂/n₁; D₂ = 2 - 3Y n₃/n₂; D₃ = 3 - 4Y n₄/n₃. With too little text to estimate them:
    a half of each count, at most 1.
    """
    n = [float((counts == number).sum()) for number in range(5)]
    if not all(n[1:]):
        return np.asarray([0.0, 0.5, 1.0, 1.0])
    y = n[1] / (n[1] + 2 * n[2])
    estimated = [number - (number + 1) * y * n[number + 1] / n[number] for number in (1, 2, 3)]
    return np.asarray([0.0, *(np.clip(d, 0.05, number) for number, d in enumerate(estimated, 1))])


class KneserNey:
    """P(w|h) = max(c(hw) - D, 0)/c(h) + γ(h) P(w|h'), h' the context without its first token; below unigrams 1/V.

    Counts of the lower orders are numbers of different tokens that come before (equation 24).
    """

    def __init__(self, order: int, vocab_size: int):
        if order < 1 or vocab_size**order >= 2**63:
            raise InputError(f"--ngram_order {order}: must be at least 1, and {vocab_size}^{order} fit into 63 bits.")
        self.order, self.vocab_size = order, vocab_size
        self.orders: list[Order] = []  # unigrams first

    def fit(self, sequences: Iterable[list[int]], start: int) -> "KneserNey":
        """Count, and replace what was counted before.

        Args:
            sequences: token ids; each begins after `order - 1` times the token `start`.
        """
        coded = np.concatenate([self._codes(sequence, start) for sequence in sequences])
        grams, counts = np.unique(coded, return_counts=True)
        orders = []
        for length in range(self.order, 0, -1):
            orders.append(self._smooth(grams, counts))
            grams, counts = np.unique(grams % self.vocab_size ** (length - 1), return_counts=True)
        self.orders = orders[::-1]
        return self

    def _codes(self, sequence: list[int], start: int) -> np.ndarray:
        """The n-gram that ends at each token, (len(sequence),) int64."""
        padded = np.asarray([start] * (self.order - 1) + sequence, dtype=np.int64)
        windows = np.lib.stride_tricks.sliding_window_view(padded, self.order)
        return windows @ (np.int64(self.vocab_size) ** np.arange(self.order - 1, -1, -1))

    def _smooth(self, grams: np.ndarray, counts: np.ndarray) -> Order:
        contexts, first = np.unique(grams // self.vocab_size, return_index=True)
        totals = np.add.reduceat(counts, first).astype(float)
        taken = discounts(counts)[np.minimum(counts, 3)]
        of_gram = np.repeat(np.arange(len(contexts)), np.diff([*first, len(grams)]))
        return Order(grams, (counts - taken) / totals[of_gram], contexts, np.add.reduceat(taken, first) / totals)

    def logprobs(self, sequence: list[int], start: int) -> np.ndarray:
        """Log-probability in nats of each token after those before it, (len(sequence),) float64."""
        codes = self._codes(sequence, start)
        probability = np.full(len(codes), 1 / self.vocab_size)
        for length, order in enumerate(self.orders, 1):
            grams = codes % np.int64(self.vocab_size) ** length
            place, seen = _find(order.contexts, grams // self.vocab_size)
            passed = np.where(seen, order.passed[place], 1.0)
            place, known = _find(order.grams, grams)
            probability = np.where(known, order.kept[place], 0.0) + passed * probability
        return np.log(probability)


def _find(among: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of `wanted` in the sorted `among`, and whether they are there."""
    places = np.minimum(np.searchsorted(among, wanted), len(among) - 1)
    return places, among[places] == wanted
