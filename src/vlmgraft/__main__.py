"""`python -m vlmgraft` is the command line."""

from vlmgraft.cli import main

if __name__ == "__main__":
    main()
