"""One thread a test process: tests run side by side, and sums keep their order."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
