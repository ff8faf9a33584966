"""The decoder alone: from prompts on resident embeddings to masks."""
