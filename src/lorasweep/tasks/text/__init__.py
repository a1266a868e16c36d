"""Running text: documents, cut into blocks of tokens."""
