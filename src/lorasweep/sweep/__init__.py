"""Many runs: what a sweep is, the controller that owns its trials, and the workers that train them."""
