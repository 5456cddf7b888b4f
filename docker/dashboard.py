"""optuna-dashboard over the database whose URL is in the file that RANK_SEARCH_STORAGE_FILE names.

The dashboard has no login and can delete studies: keep its port to yourself. ``--health`` asks a running one.
"""

from __future__ import annotations

import os
import sys
import urllib.request
from pathlib import Path

PORT = int(os.environ.get("PORT", "8080"))


def main() -> None:
    if "--health" in sys.argv[1:]:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/api/meta", timeout=5):
            return
    from optuna.storages import get_storage
    from optuna_dashboard import run_server

    url = Path(os.environ["RANK_SEARCH_STORAGE_FILE"]).read_text(encoding="utf-8").strip()
    # Given as an object, which caches: by its URL the dashboard would read every trial anew for each look.
    storage = get_storage(url.replace("postgresql://", "postgresql+psycopg://", 1))
    run_server(storage, host=os.environ.get("HOST", "0.0.0.0"), port=PORT)


if __name__ == "__main__":
    main()
