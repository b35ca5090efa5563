"""Fields of batch rows, in both forms."""

from __future__ import annotations

from ..openai.fields import CONVERSATION_FIELDS, SAMPLING_FIELDS

OPENAI_LINE_FIELDS = ("custom_id", "method", "url", "body")
PROMPT_FIELDS = frozenset({"prompt", "prompt_token_ids", "messages"})
PLAIN_FIELDS = SAMPLING_FIELDS | PROMPT_FIELDS | CONVERSATION_FIELDS | {"custom_id", "id", "sampling_params"}
ROW_FIELDS = PLAIN_FIELDS.union(OPENAI_LINE_FIELDS)
"""Those of either form."""
