"""The loop of a worker, which trains trials in the controller's process or in Ray actors."""
