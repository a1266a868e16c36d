"""`python -m lorasweep` is the command `lorasweep`."""

from lorasweep.cli import main

if __name__ == "__main__":
    main()
