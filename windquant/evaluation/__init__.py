"""What a checkpoint is worth: perplexity on held-out text, accuracy on zero-shot tasks."""
