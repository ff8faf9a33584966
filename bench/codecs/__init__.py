"""What the HTTP gateway adds to a click."""
