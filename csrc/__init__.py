"""Operators:

one folder each, with its schema, its reference beside the formula, and its native backends.
"""
