"""The sub-commands: from plain values to what is done, printed and returned as an exit status."""
