"""The definition of a sweep: its arms with their search spaces, the confirm stage's seeds, packs and warnings."""
