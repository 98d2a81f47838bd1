"""Text files are UTF-8, with or without a byte order mark; what is not is named with its place."""

import pytest

from rcm_jax import options
from rcm_jax.config import UserError
from rcm_jax.plain_text import check_text, read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_part_of_the_text(encoding, tmp_path):
    (tmp_path / "a.txt").write_text("ein roter Füchs\nein \ufeffHund\n", encoding=encoding)
    assert read_text(tmp_path / "a.txt", "--x") == "ein roter Füchs\nein \ufeffHund\n"
    assert options.read_prompts(str(tmp_path / "a.txt")) == ["ein roter Füchs", "ein \ufeffHund"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ein Füchs".encode("latin-1"), r"--x \S+a.txt is not text in UTF-8, byte 5 is 0xfc: save it in UTF-8"),
        ("ein Fuchs".encode("utf-16"), r"--x \S+a.txt is not text in UTF-8, byte 0 is 0xff: save it in UTF-8"),
        (b"\xef\xbb\xbfa\x80", r"--x \S+a.txt is not text in UTF-8, byte 4 is 0x80: save it in UTF-8"),
        (None, r"--x \S+a.txt cannot be read \(No such file or directory\): check the path"),
    ],
)
def test_what_is_no_text_is_named(content, message, tmp_path):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_text(tmp_path / "a.txt", "--x")


def test_half_a_character_is_no_text():
    assert check_text("Füchs 🦊", "a prompt") == "Füchs 🦊"
    with pytest.raises(UserError, match=r"a prompt is not text in UTF-8 where it says 'a fox \\ud83e': give it"):
        check_text("a fox \ud83e and more", "a prompt")
