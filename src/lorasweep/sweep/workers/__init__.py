"""Who trains: the loop of a worker, in the controller's process or in Ray actors."""
