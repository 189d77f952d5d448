"""What runs a saved module: errors, checks of run-time values, threads, the artifact. Needs TVM's
runtime only.
"""
