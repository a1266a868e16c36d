"""One training: from settings, base model and data to a folder with a record, step metrics and the weights it kept."""
