"""What the commands share."""

from pathlib import Path
from typing import Any

from hirescam_jax.errors import UserError

PROGRAM = "hirescam"


def names_of(text: str) -> list[str]:
    """Of a text with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def read_names(path: Path) -> Any:
    """A JSON file of names -> lists."""
    import json

    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise UserError(f'{path}: give {{"name": ["...", "..."], ...}}')
    return content
