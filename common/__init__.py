"""What both services share: settings, errors, the embedding cache, the batcher, the server scaffold."""
