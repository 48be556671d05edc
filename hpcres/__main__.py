"""The entry points `hpcres` and `python -m hpcres`; the latter is for torchrun and mpirun."""

import sys

from hpcres.signals import guard_process


def main() -> None:
    """Install the signal handlers before any heavy import, then run the command."""
    guard_process(next((word for word in sys.argv[1:2] if not word.startswith("-")), "hpcres"))
    from hpcres.cli import main as run

    run()


if __name__ == "__main__":
    main()
