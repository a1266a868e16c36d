"""Texts with labels: classes and numbers."""
