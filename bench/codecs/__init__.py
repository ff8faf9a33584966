"""Embeddings stored in fewer bytes."""
