"""Compile, deploy, check: the verbs."""
