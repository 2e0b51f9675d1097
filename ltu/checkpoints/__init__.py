"""Checkpoint folders: opened, converted from and to the original's files, merged, downloaded."""
