"""The built-in rules: one file each, found by being there.

`optforge.rules.adam` and `optforge.rules["adam"]` are the Rule of that name; iteration gives the names.
"""

import sys

from ..core.catalogue import Catalogue

sys.modules[__name__].__class__ = Catalogue
