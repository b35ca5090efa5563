"""OpenAI's format of completions and chat completions: requests, responses, errors."""
