"""Builds the API reference, one HTML page a module, from the docstrings.

    python scripts/build_api.py [FOLDER]         # default: out/api

Every public module, class and function is in it. Needs pdoc (the extra `docs`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc

PACKAGES = ("bitcore", "bitlayers", "bitlab_hf", "bitlab_hf.train")


def main() -> None:
    """Writes the pages and says where."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/api")
    pdoc.render.configure(docformat="google", show_source=False, footer_text="BitLab")
    pdoc.pdoc(*PACKAGES, output_directory=folder)
    print(folder / "index.html")


if __name__ == "__main__":
    main()
