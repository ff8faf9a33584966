"""What stands between the products of a block, and those products."""
