"""Plans: what a step will need, before it runs and on devices that are not here."""
