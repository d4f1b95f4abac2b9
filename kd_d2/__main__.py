"""python -m kd_d2 is the program kd-d2."""

from kd_d2.cli import main

if __name__ == "__main__":  # not in the processes that a training spawns
    main()
