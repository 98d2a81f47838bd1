"""Readers and writers of other projects' weight layouts."""
