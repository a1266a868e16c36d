"""Reads files and hub data sets into rows, and checks them."""
