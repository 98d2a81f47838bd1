"""A fixed text encoder with no weights: enough for captions of a few words, the same on every machine."""

import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from rcm_jax.config import UserError
from rcm_jax.plain_text import check_text

LENGTH = 8
DIM = 32
LONGEST_PROMPT = 4096  # characters


def encode(prompts: Sequence[str], *, length: int = LENGTH, dim: int = DIM) -> Float[np.ndarray, "b s d"]:
    """Encodes prompts word by word: a unit-variance vector drawn from a hash of the word, plus a position code.

    Rows after the last word are exactly zero, as umT5's are in Wan; the empty prompt is all zeros.
    Words are split at white space and lower-cased.

    Raises:
        UserError: a prompt has more than `length` words or LONGEST_PROMPT characters, or is no text.
    """
    text_BSD = np.zeros((len(prompts), length, dim), np.float32)
    vectors = {}
    for row, prompt in enumerate(prompts):
        if len(prompt) > LONGEST_PROMPT:
            raise UserError(
                f"{prompt[:30]!r}... has {len(prompt):,} characters, at most {LONGEST_PROMPT:,} fit: shorten it"
            )
        words = check_text(prompt, "a prompt").lower().split()
        if len(words) > length:
            raise UserError(f"{prompt!r} has {len(words)} words, at most {length} fit: shorten it or raise length")
        for position, word in enumerate(words):
            if word not in vectors:
                vectors[word] = _word_vector(word, dim)
            text_BSD[row, position] = vectors[word]
        text_BSD[row, : len(words)] += _position_code(length, dim)[: len(words)]
    return text_BSD


def _word_vector(word: str, dim: int) -> Float[np.ndarray, "d"]:
    """Draws a vector uniformly from [-sqrt 3, sqrt 3) with the word's SHAKE-256 digest as the random bits."""
    bits = np.frombuffer(hashlib.shake_256(word.encode()).digest(4 * dim), "<u4")
    return ((bits / 2**32 * 2 - 1) * np.sqrt(3)).astype(np.float32)


def _position_code(length: int, dim: int) -> Float[np.ndarray, "s d"]:
    """Sines and cosines of position at wavelengths from 2 pi up, at half amplitude so that words dominate."""
    frequency = 100.0 ** (-np.arange(dim // 2) / (dim // 2))
    angle = np.arange(length)[:, None] * frequency
    code = np.zeros((length, dim), np.float32)
    code[:, 0 : dim // 2 * 2 : 2] = np.sin(angle)
    code[:, 1 : dim // 2 * 2 : 2] = np.cos(angle)
    return code / 2
