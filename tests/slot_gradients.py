"""Reads the gradients of one slot of a pack."""


def read_slot_gradients(slots, slot):
    """Returns the gradients of the parameters of a slot's solo model by name."""
    rows = [row for row in slots.weights.find_rows(slot) if row.tensor.grad is not None]
    return {name: part for row in rows for name, part in row.split(row.view(row.tensor.grad)).items()}
