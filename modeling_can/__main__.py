"""`python -m modeling_can`: the command `modeling-can`."""

from .cli import main


__all__ = []

if __name__ == "__main__":
    main()
