"""Objectives: what is learned from examples. Each has its loss, its metrics and its values by example in one class."""
