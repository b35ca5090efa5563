"""`python -m shoal` is the command line."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `-m` puts the working directory first on the search path: a user's numpy.py there is not ours to import.
    if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
        del sys.path[0]

    from shoal.cluster.commands.cli import main

    main()
