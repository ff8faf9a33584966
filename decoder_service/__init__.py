"""The decoder service: prompts in, masks out, many people and images in one batch."""
