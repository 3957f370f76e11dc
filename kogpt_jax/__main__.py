"""``python -m kogpt_jax`` is the ``kogpt`` command."""

from kogpt_jax.cli import main

if __name__ == "__main__":
    main()
