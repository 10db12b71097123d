"""`python -m tagstore.cli`."""

from tagstore.cli import main

if __name__ == "__main__":
    main()
