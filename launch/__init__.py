"""Programs to start with `python -m launch.NAME`."""
