"""`python -m nano_moe VERB`."""

from nano_moe.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
