"""Tests of the report; a package so that they share the builder in `conftest`."""
