"""Examples, tokenizers, image processing, batches."""
