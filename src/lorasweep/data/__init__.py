"""Files, splits, rows and batches: the code for data that all tasks share."""
