"""Conversations: the model learns the answers of the assistant."""
