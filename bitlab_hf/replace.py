"""`bitlab_hf.model.replace` under the path that it had before there were rooms."""

import sys

from bitlab_hf.model import replace

sys.modules[__name__] = replace
