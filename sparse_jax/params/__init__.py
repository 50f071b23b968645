"""Parameters: the names, roles and axes of their leaves."""
