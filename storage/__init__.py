"""Where sweeps are kept: the Optuna database, the claims of its workers, the checkpoints.

Import from the submodules: :mod:`storage.engine` opens a database, :mod:`storage.trials` hands
its trials to workers exactly once, :mod:`storage.checkpoints` keeps training states. Importing
these three is cheap; Optuna, SQLAlchemy and PyTorch load at the first call that needs them.
"""
