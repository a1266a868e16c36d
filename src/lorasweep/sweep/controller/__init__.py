"""The one owner of a sweep's studies: it proposes trials, decides at rungs and takes results."""
