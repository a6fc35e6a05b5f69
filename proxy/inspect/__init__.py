"""Answers for an operator: explain, diff."""
