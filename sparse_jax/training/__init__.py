"""The training room: from settings to a run directory."""
