"""``python -m oftfx.cli``."""

from oftfx.cli import main

main()
