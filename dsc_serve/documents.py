"""Documents that others wrote, JSON and TOML, whatever they hold: too large, nested too deeply, or no file at all."""

from __future__ import annotations

import json
import os
import stat
import tomllib
from pathlib import Path
from typing import Any

MAX_BYTES = 2**27  # the largest tokenizer_config.json seen has 2**22


class DocumentError(ValueError):
    """A document that cannot be read; one line that does not name the file."""


def read_document(path: Path, most: int = MAX_BYTES) -> str:
    """The text of a file of at most so many bytes. Raises DocumentError, and FileNotFoundError."""
    try:
        # A pipe in the file's place must not hold the reader up.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DocumentError("it is not a file")
            content = file.read(most + 1)
        if len(content) > most:
            raise DocumentError(f"it is larger than {most} bytes")
        return content.decode("utf-8")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise DocumentError(str(error)) from None


def parse_json(text: str) -> Any:
    """Raises DocumentError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise DocumentError("it is nested too deeply") from None
    except ValueError as error:  # no JSON, or a number of too many digits
        raise DocumentError(str(error)) from None


def parse_toml(text: str) -> dict[str, Any]:
    """Raises DocumentError."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise DocumentError("it is nested too deeply") from None
    except ValueError as error:
        raise DocumentError(str(error)) from None
