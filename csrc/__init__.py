"""Operators: one folder each, with schema, reference beside the formula, and backends."""
