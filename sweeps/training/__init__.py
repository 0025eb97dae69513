"""The training engine: it knows neither trials nor databases, neither models nor data sets."""
