"""The built-in rules: one file each, found by being there.

`optforge.rules.adam` and `optforge.rules["adam"]` are the Rule of that name; iteration gives the names.
"""

import sys

from ..catalogues import Catalogue

sys.modules[__name__].__class__ = Catalogue
