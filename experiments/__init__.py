"""Commands: each is `python -m experiments.<name>`."""
