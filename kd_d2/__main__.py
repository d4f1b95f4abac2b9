"""Entry point of python -m kd_d2, the same program as kd-d2."""

from kd_d2.cli import main

if __name__ == "__main__":  # not in the processes that a training spawns
    main()
