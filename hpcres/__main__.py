"""The program: `hpcres`, and `python -m hpcres` for torchrun and mpirun."""

import sys

from hpcres.signals import guard_process


def main() -> None:
    """Handle signals before anything heavy is imported, then run the command."""
    guard_process(next((word for word in sys.argv[1:2] if not word.startswith("-")), "hpcres"))
    from hpcres.cli import main as run

    run()


if __name__ == "__main__":
    main()
