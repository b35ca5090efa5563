"""The chat template of a model directory, as text: it tells the chat format and is never run."""

from __future__ import annotations

from pathlib import Path

from .tokenizer import read_json

TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 1 << 20


def read_chat_template(directory: str | Path) -> str | None:
    """Read `chat_template.jinja`, or else `chat_template` of tokenizer_config.json; None if there is neither.

    Of several named templates, the one named default counts. ValueError for a template that is no text.
    """
    path = Path(directory) / TEMPLATE_FILE
    if path.is_file():
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise ValueError(f"{path} has more than {MAX_TEMPLATE_BYTES} bytes; it cannot be a chat template")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    config_file = Path(directory) / "tokenizer_config.json"
    template = (read_json(config_file) or {}).get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    if not isinstance(template, str | None):
        raise ValueError(f"{config_file}: chat_template must be text, got {type(template).__name__}")
    return template
