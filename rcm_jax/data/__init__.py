"""Data: how records are made (`digits`, `text`) and how a run reads them (`pipeline`)."""
