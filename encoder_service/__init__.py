"""The encoder service: image bytes in, embedding computed once and kept in the cache."""
