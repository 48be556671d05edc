"""`python -m hpcres`, so that torchrun and mpirun can start the same program."""

from hpcres.cli import main

if __name__ == "__main__":
    main()
