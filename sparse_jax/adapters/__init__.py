"""Methods that choose what is trained, one file for each."""
