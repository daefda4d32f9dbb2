"""Text on its way in and out: chat templates and tokenizer, detokenizer and stop strings."""
