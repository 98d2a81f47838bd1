"""Programs that measure: each prints a table, writes JSON, and says the machine and the command."""
