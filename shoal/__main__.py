"""`python -m shoal` is the command line."""

from shoal.cluster.commands.cli import main

if __name__ == "__main__":
    main()
