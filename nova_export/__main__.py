"""python -m nova_export, where the command is not on the path."""

from nova_export.cli import main

if __name__ == "__main__":
    main()
