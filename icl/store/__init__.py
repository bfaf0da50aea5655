"""Stores of bytes by key, in a folder or a bucket. They do not depend on runs."""
