"""Text that users give: UTF-8, in files with or without the byte order mark that Excel and Windows write first."""

from pathlib import Path

from rcm_jax.config import UserError


def read_text(path: Path, option: str) -> str:
    """The text of the file that an option names. Raises UserError if it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise UserError(f"{option} {path} cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise UserError(f"{option} {path} is not text in UTF-8, {where}: save it in UTF-8") from None


def check_text(text: str, name: str) -> str:
    """The text, which `name` describes. Raises UserError if it is none: a terminal's or JSON's half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = ascii(text[max(0, error.start - 20) : error.end])
        raise UserError(f"{name} is not text in UTF-8 where it says {shown}: give it in UTF-8") from None
    return text
