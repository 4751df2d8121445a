"""The command line: dispatch, composition with Hydra, one grammar of arguments."""
