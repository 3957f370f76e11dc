"""The demo model that ships with the package: a directory in Hugging Face layout, and the script that made it."""

import pathlib

DIRECTORY = pathlib.Path(__file__).parent
