"""How vit_t was made: materials, drawn scenes, prompts, losses, the training loop and its evaluation."""
