"""``python -m rank_search``: the command line."""

from rank_search.cli import main

main()
