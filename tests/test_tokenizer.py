"""Tokenisers: both kinds of file give the same ids, special tokens are the file's own, prompts are cleaned as Wan's."""

import io

import pytest
import sentencepiece
import tokenizers

from rcm_jax.config import UserError
from rcm_jax.data.tokenizer import clean_prompt, load_tokenizer

# Where T5 and umT5 have the special tokens; umT5 also knows "<s>".
SPECIALS = {"t5": dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1), "umt5": dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3)}
PROMPTS = ["a red cat runs", "", "the cat ☃ ran", "a cat and a dog ran in the red sun " * 4]


@pytest.fixture(params=SPECIALS)
def specials(request):
    return SPECIALS[request.param]


@pytest.fixture
def folder(specials, tmp_path):
    """A folder with spiece.model and the tokenizer.json that has the same pieces and scores."""
    file = io.BytesIO()
    words = ["a red cat runs in the sun", "the dog and the cat ran", "a dog runs", "red sun"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 5), model_writer=file, vocab_size=22, minloglevel=2, **specials
    )
    (tmp_path / "spiece.model").write_bytes(file.getvalue())
    model = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(len(model))]
    fast = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, specials["unk_id"], byte_fallback=False))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    fast.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    fast.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize(
    "file", ["spiece.model", "tokenizer.json", ""], ids=["spiece.model", "tokenizer.json", "folder"]
)
def test_ids_are_the_pieces_then_the_end_then_padding(file, folder):
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    ids, mask = load_tokenizer(folder / file, length=16)(PROMPTS)
    assert ids.shape == mask.shape == (4, 16)
    for prompt, row, is_token in zip(PROMPTS, ids, mask, strict=True):
        expected = [*model.encode(prompt)[:15], model.eos_id()]
        assert row.tolist() == expected + [0] * (16 - len(expected))
        assert is_token.tolist() == [True] * len(expected) + [False] * (16 - len(expected))


def test_an_unknown_character_has_the_id_that_the_file_gives_it(folder, specials):
    for file in ("spiece.model", "tokenizer.json"):
        ids, _ = load_tokenizer(folder / file, length=16)(["☃"])
        assert specials["unk_id"] in ids[0]


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a\n cat\t sat ", "a cat sat"),
        ("a &amp;amp; b", "a & b"),
        ("色调艳丽，过曝", "色调艳丽,过曝"),
        ("a “quoted” word", 'a "quoted" word'),
        ("a cafÃ© wall", "a café wall"),
    ],
    ids=["spaces", "html", "full width", "quotes", "wrong encoding"],
)
def test_a_prompt_is_cleaned_as_by_wan(prompt, cleaned):
    assert clean_prompt(prompt) == cleaned


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json"])
def test_a_prompt_in_latin_1_is_an_error(file, folder):
    """As Python gives a word of the command line that is not UTF-8."""
    tokenize = load_tokenizer(folder / file, length=16)
    with pytest.raises(UserError, match=r"a prompt is not text in UTF-8 where it says 'caf\\udce9': give it in UTF-8"):
        tokenize(["a cat", "caf\udce9"])


@pytest.mark.parametrize("file", ["tokenizer.json", "spiece.model"])
def test_a_broken_file_is_an_error(file, tmp_path):
    (tmp_path / file).write_bytes(b"nothing")
    with pytest.raises(UserError, match=f"{file} cannot be read"):
        load_tokenizer(tmp_path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"must be tokenizer\.json, spiece\.model or a folder with one"):
        load_tokenizer(tmp_path)


def test_a_file_of_another_kind_of_model_is_an_error(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="must know <pad> and put </s> last: take the text encoder's own file"):
        load_tokenizer(tmp_path)
