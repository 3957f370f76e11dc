"""The shipped demo model: a Hugging Face directory beside the script that made it (`train.py`)."""

import pathlib

DIRECTORY = pathlib.Path(__file__).parent
