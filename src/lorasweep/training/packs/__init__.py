"""Trials that train together: in each step their rows pass once through one frozen base; each trial has a slot."""
