"""``python -m memdec`` is the command ``memdec``."""

from memdec.cli import main

if __name__ == "__main__":
    main()
