"""What happens to callers while parts of a deployment fail; see `__main__`."""
