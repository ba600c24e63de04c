"""The command ``bitlab``: its help, completion and wrong usage need neither torch nor transformers.

Where this module is imported first, `bitcore.lazy` leaves the packages' names for later.
"""

from __future__ import annotations

import bitlab_autoload


def main() -> None:
    """Runs the command line."""
    from bitlab_hf.cli import main as run

    # Nothing else tells transformers of BitLab until one of the names is asked for.
    bitlab_autoload.install()
    run()
