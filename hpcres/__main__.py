"""The program: `hpcres`, and `python -m hpcres`, so that torchrun and mpirun can start it too."""

import sys

from hpcres.signals import guard_process


def main() -> None:
    """Hear signals before anything heavy is imported, then run the command."""
    guard_process(next((word for word in sys.argv[1:2] if not word.startswith("-")), "hpcres"))
    from hpcres.cli import main as run

    run()


if __name__ == "__main__":
    main()
