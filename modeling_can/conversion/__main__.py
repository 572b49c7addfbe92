"""The command `python -m modeling_can.conversion`."""

from .export import main


if __name__ == "__main__":
    main()
