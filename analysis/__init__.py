"""What people run, from a checkout: python -m analysis.quickstart."""

from analysis.common.extras import require

require("demo", "tyro", "sklearn")
