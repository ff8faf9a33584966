"""What a click costs the decoder service around the model, its event loop above all."""
