"""Chat formats: conversations to prompts, and outputs to reasoning, content and tool calls."""
