"""Tokenizer, incremental detokenizer, chat format."""
