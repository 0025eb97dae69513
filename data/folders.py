"""Where data sets lie: the user's own folders, or those that the environment names."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

DATA_DIR_VARIABLE = "SWEEP_DATA_DIR"

CACHE_DIR_VARIABLE = "SWEEP_CACHE_DIR"


def cache_dir() -> Path:
    """Return the folder that decoded data sets are kept in.

    It is $SWEEP_CACHE_DIR where that is set, else the user's cache folder.
    """
    chosen = os.environ.get(CACHE_DIR_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("sweep"))


def default_data_dir() -> Path:
    """Return the folder for downloads.

    It is $SWEEP_DATA_DIR where that is set, else a folder in the cache.
    """
    chosen = os.environ.get(DATA_DIR_VARIABLE)
    return Path(chosen).expanduser() if chosen else cache_dir() / "datasets"
