"""The command line in this process, as the command line's own tests have it."""

from tests.bitlab_hf.cli.conftest import cli  # noqa: F401
