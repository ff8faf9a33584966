"""What goes into every model and comes out of it; imports nothing, for processes that only decode images."""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")  # of files
IMAGE_SIDE_PX = 1024  # of the square that an image is brought to
EMBEDDING_SHAPE = (256, 64, 64)
LOW_RES_SIDE_PX = 256  # of logits
