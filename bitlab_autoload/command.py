"""The command ``bitlab``: its help, completion and wrong usage need neither torch nor transformers.

While it runs, `bitcore.lazy` leaves the packages' names for later.
"""

from __future__ import annotations

import bitlab_autoload

# Whether this process is the command, and not one that merely imports it.
runs = False


def main() -> None:
    """Runs the command line."""
    global runs
    runs = True
    from bitlab_hf.cli import main as run

    # Nothing else tells transformers of BitLab until one of the names is asked for.
    bitlab_autoload.install()
    run()
