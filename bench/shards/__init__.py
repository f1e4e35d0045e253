"""Runs that several processes share: the files of one process, by actors of Ray or torchrun."""
