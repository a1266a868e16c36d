"""Reads files and hub data sets, checks their rows and assigns them to splits."""
