"""Captions as token ids, by the tokeniser file that comes with a text encoder."""

import html
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import ftfy
import numpy as np
import sentencepiece
import tokenizers
from jaxtyping import Bool, Int

from rcm_jax.config import UserError
from rcm_jax.plain_text import check_text

PAD, END = "<pad>", "</s>"


class Tokens(NamedTuple):
    """Captions of one length: token ids, and which of them are not padding."""

    ids_BS: Int[np.ndarray, "b s"]
    mask_BS: Bool[np.ndarray, "b s"]


def clean_prompt(prompt: str) -> str:
    """The prompt as Wan's encoder saw it in training: broken or full-width characters mended, white space single.

    Cosmos-Predict2's prompts go in as they are.
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def load_tokenizer(path: str | os.PathLike, *, length: int = 512) -> Callable[[Sequence[str]], Tokens]:
    """The function from prompts to ids and mask of `length` tokens, the last of each prompt being "</s>".

    Longer prompts are cut, shorter ones padded; one that is no text raises UserError. The special tokens' ids are the
    file's own: umT5's and T5's differ.

    Args:
        path: tokenizer.json, spiece.model, or a folder that holds one of them.
        length: tokens of every prompt.

    Raises:
        UserError: there is no such file, it cannot be read, or it lacks "<pad>" or "</s>".
    """
    file = _find(Path(path))
    encode = _load_json(file, length) if file.suffix == ".json" else _load_sentencepiece(file, length)

    def tokenize(prompts: Sequence[str]) -> Tokens:
        ids, counts = encode([check_text(prompt, "a prompt") for prompt in prompts])
        return Tokens(np.array(ids, np.int32), np.arange(length)[None] < np.array(counts)[:, None])

    return tokenize


# (prompts) -> (ids of each, padded; how many of them are not padding)
_Encode = Callable[[Sequence[str]], tuple[list[list[int]], list[int]]]


def _find(path: Path) -> Path:
    candidates = [path / "tokenizer.json", path / "spiece.model"] if path.is_dir() else [path]
    for file in candidates:
        if file.is_file():
            return file
    raise UserError(f"tokeniser {path} must be tokenizer.json, spiece.model or a folder with one: check the path")


def _load_json(file: Path, length: int) -> _Encode:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises this very class
        raise UserError(f"tokeniser {file} cannot be read ({error}): fetch it again") from None
    pad, end = (tokenizer.token_to_id(token) for token in (PAD, END))
    if pad is None or end is None or tokenizer.encode("").ids[-1:] != [end]:
        raise UserError(f"tokeniser {file} must know {PAD} and put {END} last: take the text encoder's own file")
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad, pad_token=PAD)

    def encode(prompts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        encodings = tokenizer.encode_batch(list(prompts))
        return [encoding.ids for encoding in encodings], [sum(encoding.attention_mask) for encoding in encodings]

    return encode


def _load_sentencepiece(file: Path, length: int) -> _Encode:
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"tokeniser {file} cannot be read ({error}): fetch it again") from None
    pad, end = model.pad_id(), model.eos_id()
    if pad < 0 or end < 0:
        raise UserError(f"tokeniser {file} must know {PAD} and {END}: take the text encoder's own file")

    def encode(prompts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        ids = [[*pieces[: length - 1], end] for pieces in model.encode(list(prompts))]
        return [each + [pad] * (length - len(each)) for each in ids], [len(each) for each in ids]

    return encode
