"""`python -m proxy` is `breakwater`."""

from proxy.cli import main

if __name__ == "__main__":
    main()
