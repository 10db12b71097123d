"""`python -m tuna_model.cli`."""

from tuna_model.cli import main

main()
