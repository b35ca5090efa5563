"""`shoal serve`: OpenAI's API over HTTP."""
