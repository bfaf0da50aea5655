"""Stores that map keys to bytes.

A store is in a folder, a bucket or a repository of the Hugging Face Hub. This package does not use `icl.runs`.
"""
